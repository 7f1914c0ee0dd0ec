"""Who is ahead, by how much, and how sure that is: tiles, levels and paired differences of a report. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_score.metrics.compare import ScoredPolicy, counted, per_pair
from dpo_score.metrics.diagnostics import health_diagnosis
from dpo_score.metrics.sentences import p_value
from dpo_score.metrics.summary import measure, share
from dpo_score.report import charts
from dpo_score.report.charts import Dot, Series
from dpo_score.report.content import Cell, Facts, Palette, bounds, percent, signed
from dpo_score.report.tables import SLICE_METRICS

HEADINGS = {"accuracy": "Accuracy", "margins": "Margin", "margins_nats": "Margin in nats", "loss": "Loss"}


def tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """(label, value, note) of the numbers that decide."""
    best = next((policy for policy in facts.found["policies"] if policy["name"] == facts.found["best"]), None)
    listed = [("compared", f"{facts.found['pairs']:,} pairs", _groups_note(facts.found))]
    if best is not None:
        accuracy, margin = best["accuracy"], best["margins"]
        listed = [
            (f"accuracy of {best['name']}", percent(accuracy["value"]), f"95 %: {bounds(accuracy['ci95'], 100, 1)} %"),
            ("its mean margin", f"{signed(margin['mean'])} β·nats", f"95 %: {bounds(margin['ci95'])}"),
            *listed,
        ]
    doubted = f"of {facts.audit.pairs:,}: every policy ranks them against the label"
    return [*listed, ("labels in doubt", f"{facts.audit.against:,} pairs", doubted)]


def _groups_note(found: Cell) -> str:
    if found["groups"] == found["pairs"]:
        return "each with a prompt of its own"
    return f"in {found['groups']:,} groups; intervals allow for it"


def levels(facts: Facts, colours: Palette) -> list[dict[str, Any]]:
    """One row a policy."""
    against = {item["policy"]: item for item in facts.found["versus_best"].get("accuracy", [])}
    rows = []
    for policy in facts.found["policies"]:
        colour, title = colours.colours[policy["name"]], f"margins of {policy['name']}"
        rows.append(
            {
                "name": policy["name"],
                "swatch": charts.swatch(colour),
                "best": policy["name"] == facts.found["best"],
                "accuracy": percent(policy["accuracy"]["value"]),
                "interval": bounds(policy["accuracy"]["ci95"], 100, 1),
                "against_best": _against_best(policy, facts.found["best"], against),
                "ties": policy["ties"],
                "margin": signed(policy["margins"]["mean"]),
                "nats": signed(policy["margins_nats"]["mean"]),
                "loss": "–" if policy["loss"]["mean"] is None else f"{policy['loss']['mean']:.3f}",
                "histogram": charts.tiny_histogram(policy["histogram"], colour, title),
            }
        )
    return rows


def asides(facts: Facts) -> list[str]:
    """What the pairs that were cut, and labelled ties, change about the levels."""
    flags, policies = facts.aligned.first.rows.flags, facts.aligned.policies
    lines = []
    cut = flags["truncated"]
    if cut.any() and not cut.all():
        shares = [share(per_pair(policy.rows, "accuracy")[~cut], policy.rows.clusters[~cut]) for policy in policies]
        listed = ", ".join(f"{p.name} {percent(s['value'])}" for p, s in zip(policies, shares, strict=True))
        lines.append(f"{int(cut.sum()):,} pairs were cut to fit; accuracy without them: {listed}.")
    if flags["tied"].any():
        lines.append(f"{int(flags['tied'].sum()):,} pairs that the data calls a tie are left out of accuracy.")
    return lines


def _against_best(policy: Cell, best: str | None, against: Mapping[str, Cell]) -> str:
    """What the comparison with the best policy says, in the sentence's words."""
    if policy["name"] == best:
        tied = [item["tied"] for item in against.values()]
        if not tied:
            return "nothing to compare with"
        return "highest, not told apart" if all(tied) else "highest" if any(tied) else "best"
    item = against.get(policy["name"])
    if item is None:
        return "not ranked: ties"
    if item["mean"] is None:
        return "no pair in common"
    if item["tied"]:
        return "not told apart"
    return "worse" if item["mean"] < 0 else "better on pairs of both"


def differences(facts: Facts) -> list[dict[str, Any]]:
    """Groups of paired differences: to the best, and to the baseline."""
    found, groups = facts.found, []
    best = found["versus_best"].get("accuracy", [])
    if best and found["best"] != found["baseline"]:
        rows = [_difference(item, 100) for item in best]
        groups.append({"title": f"Accuracy, minus the best ({found['best']})", "rows": rows})
    for metric, items in found["versus_baseline"].items():
        rows = [_difference(item, 100 if metric == "accuracy" else 1) for item in items]
        groups.append({"title": f"{HEADINGS[metric]}, minus the baseline ({found['baseline']})", "rows": rows})
    return groups if any(group["rows"] for group in groups) else []


def _difference(item: Cell, scale: float) -> dict[str, Any]:
    if item["mean"] is None:
        return {"policy": item["policy"], "reason": item.get("reason") or "cannot be had"}
    unit = " points" if scale == 100 else ""
    return {
        "policy": item["policy"],
        "difference": signed(scale * item["mean"], 1 if scale == 100 else 3) + unit,
        "interval": bounds(item["ci95"], scale, 1 if scale == 100 else 3),
        "p": p_value(item["p"]),
        "adjusted": p_value(item["p_adjusted"]),
        "won": item["won"] if unit else "",
        "lost": item["lost"] if unit else "",
        "detectable": "–" if item["detectable"] is None else f"{scale * item['detectable']:.2f}",
    }


SHOWN_HISTOGRAMS = 8


def subsets(facts: Facts, colours: Palette) -> list[dict[str, Any]]:
    """Dot plots: data sets where there are several, subsets where there are any."""
    listed = []
    for label, heading in (("dataset", "Data set"), ("subset", "Subset")):
        groups = facts.found["subsets"][label]
        if len(groups) >= (2 if label == "dataset" else 1):
            listed.append({"heading": heading, **dot_plot(groups, colours)})
    return listed


def subset_differences(facts: Facts) -> list[dict[str, Any]]:
    """Accuracy of each group minus the anchor's, with p adjusted over all groups and policies; surest first."""
    key, anchor = (
        ("versus_baseline", facts.found["baseline"])
        if facts.found["baseline"]
        else ("versus_best", facts.found["best"])
    )
    listed = []
    for label, heading in (("dataset", "data set"), ("subset", "subset")):
        groups = facts.found["subsets"][label]
        for name, group in groups.items() if len(groups) > 1 else ():
            for policy, cell in group["policies"].items():
                item = cell.get(key)
                if item is not None and item["mean"] is not None:
                    listed.append((item, {"group": f"{heading} {name}", "policy": policy}))
    listed.sort(key=lambda one: (one[0]["p_adjusted"] is None, one[0]["p_adjusted"] or 0.0, one[0]["p"] or 0.0))
    return [
        row
        | {
            "anchor": anchor,
            "difference": f"{signed(100 * item['mean'], 1)} points",
            "interval": bounds(item["ci95"], 100, 1),
            "p": p_value(item["p"]),
            "adjusted": p_value(item["p_adjusted"]),
        }
        for item, row in listed
    ]


def slices(facts: Facts, colours: Palette) -> list[dict[str, Any]]:
    """For each slice: how it was cut, a dot plot of accuracy, and the means of every group."""
    return [
        {"heading": name, "how": one["cut"], "cells": _means(one["groups"], colours)}
        | dot_plot(one["groups"], colours, ranked=False)
        for name, one in facts.found["slices"].items()
        if one["groups"]
    ]


def _means(groups: Cell, colours: Palette) -> list[dict[str, Any]]:
    """A row for each group and key policy: means with their intervals."""
    return [
        {
            "group": name,
            "policy": policy,
            "swatch": charts.swatch(colours.colours[policy]),
            "means": [_mean(group["policies"][policy][metric]) for metric in SLICE_METRICS],
        }
        for name, group in groups.items()
        for policy in colours.key
    ]


def _mean(cell: Cell) -> tuple[str, str]:
    return signed(cell["mean"], 3), bounds(cell["ci95"], digits=3)


def dot_plot(groups: Cell, colours: Palette, ranked: bool = True) -> dict[str, Any]:
    """Accuracy of the key policies in each group. `ranked`: highest first, else in the order given."""
    cells = {name: [group["policies"][policy]["accuracy"] for policy in colours.key] for name, group in groups.items()}
    values = [
        v for row in cells.values() for cell in row for v in (cell["value"], *(cell["ci95"] or ())) if v is not None
    ]
    low, high = min([0.5, *values]), max([0.5, *values])
    low, high = max(0.0, np.floor(10 * low) / 10), min(1.0, np.ceil(10 * high + 1e-9) / 10)
    high = high if high > low else low + 0.1
    order = sorted(groups, key=lambda name: (-(cells[name][-1]["value"] or 0.0), name)) if ranked else list(groups)
    rows = [
        {
            "name": name,
            "pairs": groups[name]["pairs"],
            "svg": _dots(name, cells[name], colours, low, high),
            "values": [percent(cell["value"]) for cell in cells[name]],
        }
        for name in order
    ]
    legend = [(name, charts.swatch(colours.colours[name])) for name in colours.key]
    means = [_mean_of([cell["value"] for cell in column]) for column in zip(*cells.values(), strict=True)]
    return {"rows": rows, "axis": charts.dot_axis(low, high), "legend": legend, "means": means}


def _mean_of(values: Sequence[float | None]) -> str:
    """The macro mean: each group counting once."""
    kept = [value for value in values if value is not None]
    return percent(sum(kept) / len(kept) if kept else None)


def _dots(name: str, cells: Sequence[Cell], colours: Palette, low: float, high: float) -> Any:
    dots = []
    for policy, cell in zip(colours.key, cells, strict=True):
        least, most = cell["ci95"] or (None, None)
        dots.append(Dot(cell["value"], least, most, colours.colours[policy]))
    spoken = ", ".join(f"{policy} {percent(cell['value'])}" for policy, cell in zip(colours.key, cells, strict=True))
    return charts.dot_row(dots, low, high, f"{name}: {spoken}", 0.5)


def margins(facts: Facts, colours: Palette) -> list[dict[str, Any]]:
    """Histograms on one scale, at most SHOWN_HISTOGRAMS policies, evenly drawn from all."""
    edges = np.asarray(facts.found["margin_edges"])
    policies = facts.aligned.policies
    places = np.unique(np.linspace(0, len(policies) - 1, min(len(policies), SHOWN_HISTOGRAMS)).astype(int))
    chosen = [policies[int(place)] for place in places]
    top = max(max(counted(policy.margins, edges)) for policy in chosen)
    return [_margin(policy, edges, top, colours) for policy in chosen]


def _margin(policy: ScoredPolicy, edges: Any, top: int, colours: Palette) -> dict[str, Any]:
    kept = policy.margins[np.isfinite(policy.margins)]
    below = float(np.mean(kept < 0)) if len(kept) else None
    note = f"{percent(below)} below 0; median {signed(float(np.median(kept)) if len(kept) else None)}"
    spoken = f"margins of {policy.name}: {note}"
    svg = charts.histogram(counted(policy.margins, edges), edges.tolist(), spoken, colours.colours[policy.name], top)
    return {"name": policy.name, "note": note, "svg": svg}


def curves(facts: Facts) -> dict[str, Any]:
    """Small charts over checkpoints; empty for a single policy."""
    policies = facts.aligned.policies
    if len(policies) < 2:
        return {"charts": []}
    steps = [policy.step for policy in policies]
    by_step = None not in steps and len(set(steps)) == len(steps)
    if by_step:
        policies = tuple(sorted(policies, key=lambda policy: policy.step or 0))
    x = [float(policy.step or 0) if by_step else float(index) for index, policy in enumerate(policies)]
    names = [str(policy.step) if by_step else policy.name for policy in policies]
    return {"charts": _charts(policies, x, names), "axis": "training step" if by_step else "policy"}


def _charts(policies: Sequence[ScoredPolicy], x: Sequence[float], names: Sequence[str]) -> list[dict[str, Any]]:
    def measured(metric: str, label: str, colour: str = charts.ALL) -> Series:
        cells = [measure(per_pair(policy.rows, metric), policy.rows.repeated) for policy in policies]
        return _series(label, [cell["mean"] for cell in cells], cells, colour)

    right = [share(per_pair(policy.rows, "accuracy"), policy.rows.repeated) for policy in policies]
    accuracy = _series("accuracy", [cell["value"] for cell in right], right, charts.ALL)
    health = [health_diagnosis(policy.rows) for policy in policies]

    def healthy(name: str, label: str, colour: str = charts.ALL) -> Series:
        return _series(label, [cell[name]["value"] for cell in health], [cell[name] for cell in health], colour)

    rewards = [
        measured("chosen_rewards", "chosen", charts.CHOSEN),
        measured("rejected_rewards", "rejected", charts.REJECTED),
    ]
    drift = [healthy("drift_chosen", "chosen", charts.CHOSEN), healthy("drift_rejected", "rejected", charts.REJECTED)]
    drawn = [
        ("Accuracy", "share of pairs ranked as labelled", [accuracy], charts.percent, 0.5),
        ("Margin", "chosen reward minus rejected reward, β·nats", [measured("margins", "margin")], charts.short, 0.0),
        ("Rewards", "which side the margin comes from, β·nats", rewards, charts.short, 0.0),
        ("Loss", "mean loss", [measured("loss", "loss")], charts.short, None),
        ("Drift", "nats per token against the reference", drift, charts.short, 0.0),
        (
            "Displacement",
            "share of pairs whose chosen answer fell",
            [healthy("displaced", "displaced")],
            charts.percent,
            None,
        ),
    ]
    return [_chart(x, names, *one) for one in drawn if any(value is not None for s in one[2] for value in s.y)]


def _series(label: str, values: Sequence[float | None], cells: Sequence[Cell], colour: str) -> Series:
    pairs = [cell["ci95"] or (None, None) for cell in cells]
    return Series(label, values, [low for low, _ in pairs], [high for _, high in pairs], colour)


def _chart(
    x: Sequence[float], names: Sequence[str], title: str, note: str, series: Sequence[Series], form: Any, across: Any
) -> dict[str, Any]:
    legend = [(one.label, charts.swatch(one.colour)) for one in series] if len(series) > 1 else []
    spoken = f"{title} over checkpoints: " + "; ".join(
        f"{one.label} " + ", ".join("none" if v is None else form(v) for v in one.y) for one in series
    )
    return {
        "title": title,
        "note": note,
        "legend": legend,
        "svg": charts.line_chart(x, names, series, spoken, form, across),
    }
