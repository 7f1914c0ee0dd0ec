"""Small charts over checkpoints: accuracy, margin, rewards, loss, drift, displacement. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_score.metrics.compare import Scored, per_pair
from dpo_score.metrics.diagnosis import diagnose
from dpo_score.metrics.summary import measure, share
from dpo_score.report import charts as figures
from dpo_score.report.charts import Series
from dpo_score.report.content import Cell, Facts


def curves(facts: Facts) -> dict[str, Any]:
    """Small charts over checkpoints; empty for a single policy."""
    policies = facts.lineup.policies
    if len(policies) < 2:
        return {"charts": []}
    steps = [policy.step for policy in policies]
    by_step = None not in steps and len(set(steps)) == len(steps)
    if by_step:
        policies = tuple(sorted(policies, key=lambda policy: policy.step or 0))
    x = [float(policy.step or 0) if by_step else float(index) for index, policy in enumerate(policies)]
    names = [str(policy.step) if by_step else policy.name for policy in policies]
    return {"charts": _charts(policies, x, names), "axis": "training step" if by_step else "policy"}


def _charts(policies: Sequence[Scored], x: Sequence[float], names: Sequence[str]) -> list[dict[str, Any]]:
    def measured(metric: str, label: str, colour: int = 0) -> Series:
        cells = [measure(per_pair(policy.rows, metric), policy.rows.repeated) for policy in policies]
        return _series(label, [cell["mean"] for cell in cells], cells, colour)

    right = [share(per_pair(policy.rows, "accuracy"), policy.rows.repeated) for policy in policies]
    accuracy = _series("accuracy", [cell["value"] for cell in right], right, 0)
    health = [diagnose(policy.rows)["health"] for policy in policies]

    def healthy(name: str, label: str, colour: int = 0) -> Series:
        return _series(label, [cell[name]["value"] for cell in health], [cell[name] for cell in health], colour)

    rewards = [measured("chosen_rewards", "chosen"), measured("rejected_rewards", "rejected", 1)]
    drift = [healthy("drift_chosen", "chosen"), healthy("drift_rejected", "rejected", 1)]
    drawn = [
        ("Accuracy", "share of pairs ranked as labelled", [accuracy], figures.percent, 0.5),
        ("Margin", "chosen reward minus rejected reward", [measured("margins", "margin")], figures.short, 0.0),
        ("Rewards", "which side the margin comes from", rewards, figures.short, 0.0),
        ("Loss", "mean loss", [measured("loss", "loss")], figures.short, None),
        ("Drift", "nats per token against the reference", drift, figures.short, 0.0),
        (
            "Displacement",
            "share of pairs whose chosen answer fell",
            [healthy("displaced", "displaced")],
            figures.percent,
            None,
        ),
    ]
    return [_chart(x, names, *one) for one in drawn if any(value is not None for s in one[2] for value in s.y)]


def _series(label: str, values: Sequence[float | None], cells: Sequence[Cell], colour: int) -> Series:
    pairs = [cell["ci95"] or (None, None) for cell in cells]
    return Series(label, values, [low for low, _ in pairs], [high for _, high in pairs], colour)


def _chart(
    x: Sequence[float], names: Sequence[str], title: str, note: str, series: Sequence[Series], form: Any, across: Any
) -> dict[str, Any]:
    legend = [(one.label, figures.swatch(one.colour)) for one in series] if len(series) > 1 else []
    spoken = f"{title} over checkpoints: " + "; ".join(
        f"{one.label} " + ", ".join("none" if v is None else form(v) for v in one.y) for one in series
    )
    return {
        "title": title,
        "note": note,
        "legend": legend,
        "svg": figures.line_chart(x, names, series, spoken, form, across),
    }
