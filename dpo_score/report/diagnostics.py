"""Why policies rank as they do: calibration, length, training health, and the noise under it all. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpo_score.metrics.compare import AlignedPolicies, per_pair
from dpo_score.metrics.diagnostics import DEFINITIONS, calibration_diagnosis, health_diagnosis, length_diagnosis
from dpo_score.metrics.summary import ranking, share
from dpo_score.report import charts
from dpo_score.report.content import NARROW, Cell, Facts, Palette, bounds, percent, signed
from dpo_score.report.sections import dot_plot

LENGTH_BINS = (
    ("chosen much shorter", -np.inf, -0.5),
    ("chosen shorter", -0.5, -0.1),
    ("about equal", -0.1, 0.1),
    ("chosen longer", 0.1, 0.5),
    ("chosen much longer", 0.5, np.inf),
)
"""(nc − nr) / max(nc, nr) from … to: how much longer chosen is than rejected."""
HEALTH = {
    "displaced": ("chosen fell below the reference", percent),
    "both_fell": ("both answers fell", percent),
    "pushed_only": ("margin from pushing rejected down alone", percent),
    "saturated": ("loss weight used up", percent),
    "drift_chosen": ("chosen, nats per token", lambda value: signed(value, 3)),
    "drift_rejected": ("rejected, nats per token", lambda value: signed(value, 3)),
}


def calibration(facts: Facts, colours: Palette) -> dict[str, Any]:
    """Reliability of the key policies, and their numbers."""
    rows, lines = [], []
    for name in colours.key:
        cell = calibration_diagnosis(facts.aligned[name].rows)
        lines.append(
            (name, colours.colours[name], [(b["confidence"], b["accuracy"], b["n"]) for b in cell["bins"] if b["n"]])
        )
        rows.append(
            {
                "name": name,
                "swatch": charts.swatch(colours.colours[name]),
                "ece": _plain(cell["ece"]),
                "interval": bounds(cell["ece_ci95"], digits=3),
                "expected": _plain(cell["ece_if_calibrated"]),
                "brier": _plain(cell["brier"]),
                "nll": _plain(cell["nll"]),
                "beta": f"{facts.aligned[name].settings.beta:g}",
                "best_beta": _beta(cell["best_beta"]),
            }
        )
    return {"rows": rows, "svg": charts.reliability(lines, "accuracy against confidence, by policy")}


def _beta(fit: Cell) -> str:
    if fit["beta"] is None:
        return "none beats guessing" if fit["nll"] is not None else "–"
    return f"{'about ' if fit['at_edge'] else ''}{fit['beta']:.3g}"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def length(facts: Facts, colours: Palette) -> dict[str, Any]:
    """What length alone explains, for the key policies, and accuracy by how much longer chosen is."""
    rows, reasons = [], []
    for name in colours.key:
        policy = facts.aligned[name]
        alone, cell = ranking(policy.rows), length_diagnosis(policy.rows)
        right = share(per_pair(policy.rows, "accuracy"), policy.rows.repeated)
        reasons.append(cell["length_controlled_accuracy"].get("reason"))
        rows.append(
            {
                "name": name,
                "swatch": charts.swatch(colours.colours[name]),
                "accuracy": percent(right["value"]),
                "controlled": _shared(cell["length_controlled_accuracy"]),
                "longer": _shared(alone["longer_wins"]),
                "shorter": _shared(alone["shorter_wins"]),
                "spearman": signed(cell["spearman_margin_length"]["value"]),
                "reference": _both(alone, "reference"),
                "policy": _both(alone, "policy"),
                "flips": f"{_count(alone.get('flipped_right'))} / {_count(alone.get('flipped_wrong'))}",
            }
        )
    missing = [reason for reason in dict.fromkeys(reasons) if reason]
    return {"rows": rows, "missing": missing, "plot": dot_plot(_by_length(facts.aligned), colours, ranked=False)}


def _both(alone: Cell, model: str) -> str:
    values = (percent(alone[f"{model}_{how}"]["value"]) for how in ("sum", "per_token"))
    return " / ".join(values)


def _shared(cell: Cell) -> str:
    if cell["value"] is None:
        return "–"
    interval = f" ({bounds(cell['ci95'], 100, 0)})".replace(" ", NARROW) if cell["ci95"] else ""
    return f"{percent(cell['value'])}{interval}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _by_length(aligned: AlignedPolicies) -> dict[str, Any]:
    """bin of (nc − nr) / max → policy → accuracy; empty bins left out."""
    v = aligned.first.rows.values
    relative = (v["chosen_tokens"] - v["rejected_tokens"]) / np.maximum(v["chosen_tokens"], v["rejected_tokens"])
    groups = {}
    for name, low, high in LENGTH_BINS:
        mask = (relative >= low) & (relative < high)
        if not mask.any():
            continue
        policies = {
            policy.name: {"accuracy": share(per_pair(policy.rows, "accuracy")[mask], policy.rows.clusters[mask])}
            for policy in aligned.policies
        }
        groups[name] = {"pairs": int(mask.sum()), "policies": policies}
    return groups


def health(facts: Facts) -> dict[str, Any]:
    """One row a policy, one column a sign of trouble."""
    rows = []
    for policy in facts.aligned.policies:
        found = health_diagnosis(policy.rows)
        values = [
            "–" if found[name]["value"] is None else form(found[name]["value"]) for name, (_, form) in HEALTH.items()
        ]
        rows.append({"name": policy.name, "values": values})
    return {"senses": {label: DEFINITIONS.get(name, "") for name, (label, _) in HEALTH.items()}, "rows": rows}


def noise(facts: Facts) -> list[dict[str, Any]]:
    """How far margins may be off by numerics alone, by policy."""
    rows = []
    for name in facts.aligned.names:
        cell = facts.noise.get(name) or {}
        mean = facts.aligned[name].rows.values["margins_nats"]
        kept = mean[np.isfinite(mean)]
        rows.append(
            {
                "name": name,
                "mean": "–" if cell.get("margin_mean") is None else f"{cell['margin_mean']:.2g}",
                "max": "–" if cell.get("margin_max") is None else f"{cell['margin_max']:.2g}",
                "below": percent(cell.get("share_below")),
                "margin": signed(float(np.mean(kept)) if len(kept) else None),
                "reason": cell.get("reason", "" if cell else "not measured"),
            }
        )
    return rows
