"""Where a policy is right and how its margins lie: dot plots by group, histograms. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_score.metrics.compare import Scored
from dpo_score.metrics.matchup import counted
from dpo_score.report import charts as figures
from dpo_score.report.charts import Dot
from dpo_score.report.content import Cell, Facts, Palette, bounds, percent, signed
from dpo_score.report.tables import SLICE_METRICS

SHOWN_HISTOGRAMS = 8


def subsets(facts: Facts, colours: Palette) -> list[dict[str, Any]]:
    """Dot plots: data sets where there are several, subsets where there are any."""
    listed = []
    for label, heading in (("dataset", "Data set"), ("subset", "Subset")):
        groups = facts.found["subsets"][label]
        if len(groups) >= (2 if label == "dataset" else 1):
            listed.append({"heading": heading, **dot_plot(groups, colours)})
    return listed


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
            "swatch": figures.swatch(colours.colours[policy]),
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
    legend = [(name, figures.swatch(colours.colours[name])) for name in colours.key]
    means = [_mean_of([cell["value"] for cell in column]) for column in zip(*cells.values(), strict=True)]
    return {"rows": rows, "axis": figures.dot_axis(low, high), "legend": legend, "means": means}


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
    return figures.dot_row(dots, low, high, f"{name}: {spoken}", 0.5)


def margins(facts: Facts, colours: Palette) -> list[dict[str, Any]]:
    """Histograms on one scale, at most SHOWN_HISTOGRAMS policies, evenly drawn from all."""
    edges = np.asarray(facts.found["margin_edges"])
    policies = facts.lineup.policies
    places = np.unique(np.linspace(0, len(policies) - 1, min(len(policies), SHOWN_HISTOGRAMS)).astype(int))
    chosen = [policies[int(place)] for place in places]
    top = max(max(counted(policy.margins, edges)) for policy in chosen)
    return [_margin(policy, edges, top, colours) for policy in chosen]


def _margin(policy: Scored, edges: Any, top: int, colours: Palette) -> dict[str, Any]:
    kept = policy.margins[np.isfinite(policy.margins)]
    below = float(np.mean(kept < 0)) if len(kept) else None
    note = f"{percent(below)} below 0; median {signed(float(np.median(kept)) if len(kept) else None)}"
    spoken = f"margins of {policy.name}: {note}"
    svg = figures.histogram(counted(policy.margins, edges), edges.tolist(), spoken, colours.colours[policy.name], top)
    return {"name": policy.name, "note": note, "svg": svg}
