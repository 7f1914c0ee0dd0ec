"""The numbers of a report as text tables: Markdown, CSV, LaTeX. Pure.

Markdown and LaTeX: levels, paired differences, subsets, slices and what explains them, for reading. CSV: one long
table with full digits, a row for each number of a policy and group, for machines. Names from the data are escaped for
each format.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_score.escape import safe
from dpo_score.metrics.sentences import p_value
from dpo_score.report.numbers import TITLES, Number

Cell = Mapping[str, Any]
FORMATS = ("md", "csv", "tex")
CSV_COLUMNS = ("policy", "step", "kind", "group", "pairs", "metric", "value", "low", "high")
METRICS = ("accuracy", "margins", "margins_nats", "loss")
SLICE_METRICS = ("margins", "margins_nats", "loss", "chosen_rewards", "rejected_rewards")
"""Means of each group and policy, in the order of the columns of `_slices`."""
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "β": r"$\beta$",
    "…": r"\dots{}",
    "–": "--",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


@dataclass(frozen=True, slots=True)
class Grid:
    """A table with a title; the first column is text, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(found: Cell, reasons: Sequence[Number] = ()) -> list[Grid]:
    """Levels, differences, subsets and slices of a compare_policies, then what explains them."""
    return [_levels(found), *_differences(found), *_groups(found), *_slices(found), *_reasons(reasons)]


def _levels(found: Cell) -> Grid:
    rows = [
        (
            policy["name"],
            _share(policy["accuracy"]),
            *(_mean(policy[metric]) for metric in METRICS[1:]),
            str(policy["ties"]),
        )
        for policy in found["policies"]
    ]
    columns = ("policy", "accuracy (95 %)", "margin (95 %)", "nats (95 %)", "loss (95 %)", "ties")
    return Grid(f"Policies on {found['pairs']:,} pairs", columns, tuple(rows))


def _differences(found: Cell) -> Iterator[Grid]:
    columns = ("policy", "difference (95 %)", "p", "adjusted p", "won", "lost")
    kinds = [("best", found["versus_best"])] if found["best"] != found["baseline"] else []
    for anchor, groups in [*kinds, ("baseline", found["versus_baseline"])]:
        for metric, items in groups.items():
            if items:
                yield Grid(f"{metric} minus {found[anchor]}", columns, tuple(_difference(item) for item in items))


def _difference(item: Cell) -> tuple[str, ...]:
    if item["mean"] is None:
        return (item["policy"], str(item.get("reason")), "", "", "", "")
    tail = (p_value(item["p"]), p_value(item["p_adjusted"]), str(item["won"]), str(item["lost"]))
    return (item["policy"], _interval(item["mean"], item["ci95"]), *tail)


def _groups(found: Cell) -> Iterator[Grid]:
    names = tuple(policy["name"] for policy in found["policies"])
    for label, groups in found["subsets"].items():
        if len(groups) > 1:
            rows = tuple(
                (name, f"{group['pairs']:,}", *(_share(group["policies"][policy]["accuracy"]) for policy in names))
                for name, group in groups.items()
            )
            yield Grid(f"Accuracy by {label}", (label, "pairs", *names), rows)


def _slices(found: Cell) -> Iterator[Grid]:
    means = ("margin (95 %)", "nats (95 %)", "loss (95 %)", "chosen (95 %)", "rejected (95 %)")
    for column, one in found["slices"].items():
        rows = tuple(
            (
                f"{name} · {policy}",
                f"{group['pairs']:,}",
                _share(cell["accuracy"]),
                *(_mean(cell[metric]) for metric in SLICE_METRICS),
            )
            for name, group in one["groups"].items()
            for policy, cell in group["policies"].items()
        )
        title = f"By {column}: {one['cut']}"
        yield Grid(title, (f"{column} · policy", "pairs", "accuracy (95 %)", *means), rows)


def _reasons(reasons: Sequence[Number]) -> Iterator[Grid]:
    """For each kind of number a row a metric, a column a policy."""
    policies = tuple(dict.fromkeys(number.policy for number in reasons))
    for kind, title in TITLES.items():
        cells = {(n.metric, n.policy): _interval(n.value, n.ci95) for n in reasons if n.kind == kind}
        rows = [
            (metric, *(cells.get((metric, name), "–") for name in policies))
            for metric in dict.fromkeys(m for m, _ in cells)
        ]
        if rows:
            yield Grid(title, ("", *policies), tuple(rows))


def _share(cell: Cell) -> str:
    return _interval(cell["value"], cell["ci95"])


def _mean(cell: Cell) -> str:
    return _interval(cell["mean"], cell["ci95"])


def _interval(value: float | None, ci95: Sequence[float] | None) -> str:
    if value is None or isinstance(value, int):
        return "–" if value is None else f"{value:,}"
    shown = f"{value:.3f}" if ci95 is None else f"{value:.3f} ({ci95[0]:.3f} … {ci95[1]:.3f})"
    return shown.replace("-", "−")


def write(found: Cell, form: str, reasons: Sequence[Number] = ()) -> str:
    """All tables in one of FORMATS."""
    if form == "csv":
        return _csv(found, reasons)
    one: Callable[[Grid], str] = {"md": _markdown, "tex": _latex}[form]
    return "\n".join(one(grid) for grid in grids(found, reasons))


def _markdown(grid: Grid) -> str:
    head = "| " + " | ".join(map(_md, grid.columns)) + " |"
    line = "|" + "|".join(["---", *["---:"] * (len(grid.columns) - 1)]) + "|"
    rows = ["| " + " | ".join(map(_md, row)) + " |" for row in grid.rows]
    return "\n".join([f"**{_md(grid.title)}**", "", head, line, *rows, ""])


def _md(text: str) -> str:
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", safe(text))


def _latex(grid: Grid) -> str:
    """A table for the booktabs package."""
    rows = [" & ".join(map(_tex, row)) + r" \\" for row in grid.rows]
    return "\n".join(
        [
            rf"% {_tex(grid.title)}",
            rf"\begin{{tabular}}{{l{'r' * (len(grid.columns) - 1)}}}",
            r"\toprule",
            " & ".join(map(_tex, grid.columns)) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in safe(text))


def _csv(found: Cell, reasons: Sequence[Number]) -> str:
    """Cells that a spreadsheet would read as formulas begin with an apostrophe."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in (*_long(found), *_long_reasons(found, reasons)):
        writer.writerow([_inert(value) for value in row])
    return sink.getvalue()


def _long_reasons(found: Cell, reasons: Sequence[Number]) -> Iterator[tuple[Any, ...]]:
    for n in reasons:
        yield (n.policy, n.step, n.kind, "", found["pairs"], n.metric, n.value, *(n.ci95 or (None, None)))


def _inert(value: Any) -> Any:
    if not isinstance(value, str):
        return "" if value is None else value
    shown = safe(value)
    return f"'{shown}" if shown[:1] in "=+-@" and shown else shown


def _long(found: Cell) -> Iterator[tuple[Any, ...]]:
    for policy in found["policies"]:
        head = (policy["name"], policy["step"], "all", "", policy["pairs"])
        for metric in METRICS:
            cell = policy[metric]
            yield (
                *head,
                metric,
                cell["value"] if metric == "accuracy" else cell["mean"],
                *(cell["ci95"] or (None, None)),
            )
    sliced = {column: one["groups"] for column, one in found["slices"].items()}  # subset may be among them: once
    for kind, groups in {**found["subsets"], **sliced}.items():
        for name, group in groups.items():
            for policy in found["policies"]:
                cells = group["policies"][policy["name"]]
                head = (policy["name"], policy["step"], kind, name, group["pairs"])
                for metric in ("accuracy", *SLICE_METRICS):
                    value = cells[metric]["value" if metric == "accuracy" else "mean"]
                    yield (*head, metric, value, *(cells[metric]["ci95"] or (None, None)))
