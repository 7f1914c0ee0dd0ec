"""Results on a terminal: compact tables on standard output, JSON for machines. Nothing here computes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_score.escape import safe
from dpo_score.storage.resume import row_ranges

if TYPE_CHECKING:
    from dpo_score.engine.finish import Outcome

Cell = Mapping[str, Any]
WIDTH = 116
"""Columns that the table of a run needs: a narrower terminal wraps lines, it does not break numbers."""


def console() -> Console:
    """Standard output without markup, emoji or automatic links: what is printed is what was meant."""
    found = Console(markup=False, emoji=False, highlight=False)
    found.width = max(found.width, WIDTH)
    return found


def print_json(value: Any) -> None:
    """Strict JSON, ASCII, sorted keys."""
    print(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def lines(found: Iterable[str]) -> None:
    """One line after another, made safe."""
    for line in found:
        console().print(Text(safe(line)), soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> Table:
    """A plain table; the first `left` columns are text, the others are numbers."""
    found = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        is_text = index < left
        found.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in rows:
        found.add_row(*(Text(safe(cell)) for cell in row))
    return found


def outcome(found: Outcome, as_json: bool = False, by_subset: bool = False) -> None:
    """The table of a run: a line per policy and data set (and subset), then where the files are."""
    if as_json:
        print_json(found.summary)
        return
    screen, policies = console(), found.summary["policies"]
    lines = [line for name, policy in policies.items() for line in _lines(name, policy, by_subset)]
    heads = ("policy", "data", "n", "loss", "accuracy", "margin", "nats", "chosen", "rejected", "ref. alone")
    if lines:
        screen.print(table(heads, lines, left=2))
    for heading, rows in _slices(policies):
        screen.print(Text(f"by {safe(heading)}", style="bold"))
        screen.print(table(("policy", *heads[1:]), rows, left=2))
    _say_rejected(screen, found.summary)
    for name, reason in found.summary["skipped"].items():
        screen.print(Text(safe(f"{name}: skipped, not whole yet (the same command scores it once it is): {reason}")))
    _say_benchmark(found.summary)
    screen.print(Text(f"results in {safe(found.out)}: scores/<policy>/*.parquet, summary.json, report.html"))


def _say_benchmark(summary: Cell) -> None:
    if any("rewardbench" in policy for policy in summary["policies"].values()):
        from dpo_score.cli.console_rewardbench import benchmark

        benchmark(summary)


def _lines(name: str, policy: Cell, by_subset: bool) -> Iterator[list[str]]:
    datasets = policy["datasets"]
    for dataset, cell in datasets.items():
        yield _line(name, dataset, cell)
        if by_subset:
            yield from (_line("", f"  {subset}", found) for subset, found in policy["subsets"].get(dataset, {}).items())
    if len(datasets) > 1:
        yield _line(name, "all", policy["overall"])


def _slices(policies: Cell) -> Iterator[tuple[str, list[list[str]]]]:
    """A table for each --slice: how it was cut, and a line for each policy and group."""
    cuts = {column: cut["how"] for policy in policies.values() for column, cut in policy["slice_cuts"].items()}
    for column, how in cuts.items():
        found = {name: policy["slices"].get(column, {}) for name, policy in policies.items()}
        yield (
            f"{column} ({how})",
            [_line(name, group, c) for name, groups in found.items() for group, c in groups.items()],
        )


def _line(name: str, label: str, cell: Cell) -> list[str]:
    means = [cell[key]["mean"] for key in ("margins", "margins_nats", "chosen_rewards", "rejected_rewards")]
    alone = cell["ranking"]["reference_sum"]["value"]
    return [
        name,
        label,
        f"{cell['scored']:,}",
        number(cell["loss"]["mean"]),
        share(cell["accuracy"]),
        *(number(mean) for mean in means),
        percent(alone),
    ]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def share(cell: Cell) -> str:
    """A share with its 95 % interval: 63.1% [55.0, 70.5]."""
    if cell["value"] is None:
        return "-"
    interval = cell["ci95"]
    shown = percent(cell["value"])
    return shown if interval is None else f"{shown} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _say_rejected(screen: Console, summary: Cell) -> None:
    for name, policy in summary["policies"].items():
        codes = policy["overall"]["rejected"]
        if codes:
            listed = ", ".join(f"{count} {code}" for code, count in codes.items())
            screen.print(Text(f"{safe(name)}: not scored: {safe(listed)} (rejects/ says which and why)"))


def preview(found: Mapping[str, Any]) -> None:
    """A dry run or a probe: one line a fact."""
    screen = console()
    for key, value in found.items():
        for line in value if isinstance(value, list) else [value]:
            screen.print(Text(f"{safe(key):<14} {safe(line)}"), soft_wrap=True)


def rescored(found: Mapping[str, Any], as_json: bool = False) -> None:
    if as_json:
        print_json(found)
        return
    heads = ("policy", "loss", "beta", "n", "mean loss", "accuracy", "margin")
    rows = [
        [
            r["policy"],
            r["loss_name"],
            f"{r['beta']:g}",
            r["n"],
            number(r["loss"]),
            share(r["accuracy"]),
            number(r["margins"]),
        ]
        for r in found["rows"]
    ]
    console().print(table(heads, rows, left=2))
    for name, pairs in found["left_out"].items():
        lost = f"{name}: {pairs:,} pairs left out, which {found['reference_policy']} did not score"
        console().print(Text(safe(lost)), soft_wrap=True)
    console().print(Text(f"per pair: {safe(found['folder'])}"))


def _grid_line(row: Cell) -> list[object]:
    means = (number(row["loss"]), share(row["accuracy"]), number(row["margins"]))
    return [row["policy"], row["loss_name"], f"{row['beta']:g}", row["n"], *means]


def precomputed(found: Any, as_json: bool = False) -> None:
    if as_json:
        print_json(found.summary)
        return
    for line in found.lines():
        console().print(Text(safe(line)))


def status(found: Mapping[str, Any], as_json: bool = False) -> None:
    if as_json:
        print_json(found)
        return
    screen = console()
    screen.print(Text(f"{safe(found['out'])}: {found['state']}; {found['total_rows']:,} rows"))
    rows = [[s["stage"], f"{s['done']}/{s['blocks']}", s["rows"], s["scored"], s["rejected"]] for s in found["stages"]]
    screen.print(table(("stage", "blocks", "rows", "scored", "rejected"), rows))
    for stage in found["stages"]:
        if stage["missing"]:
            lacking = row_ranges([(start, stop) for start, stop in stage["missing"]])
            screen.print(Text(f"{safe(stage['stage'])}: {lacking} are not scored yet, counted from 0"))
    for warning in found["warnings"]:
        screen.print(Text(f"warning: {safe(warning)}"))


def verified(found: Any, as_json: bool = False) -> None:
    if as_json:
        print_json(found.to_json())
        return
    for line in found.lines():
        console().print(Text(safe(line)))


def formats(found: Sequence[Mapping[str, Any]], as_json: bool = False) -> None:
    if as_json:
        print_json(list(found))
        return
    rows = [[item["name"], item["code"], item["columns"], item["polarity"]] for item in found]
    console().print(table(("format", "", "columns", "which side is better"), rows, left=4))


def cache(found: Sequence[Mapping[str, Any]], as_json: bool = False) -> None:
    if as_json:
        print_json(list(found))
        return
    if not found:
        console().print(Text("the cache is empty"))
        return
    heads = list(found[0])
    console().print(table(heads, [[item[name] for name in heads] for item in found]))


def audited(found: Mapping[str, Any], as_json: bool = False) -> None:
    """Counts, the first suspects, where the file is."""
    if as_json:
        print_json(found)
        return
    screen = console()
    voters = f"every policy ({len(found['policies'])}) ranks"
    lines = [
        f"{found['ranked_against']:,} of {found['pairs']:,} pairs are those that {voters} against the label",
        f"{found['identical_answers']:,} pairs have identical answers; of the listed ones {found['near_identical']:,} "
        f"have nearly the same answers and {found['near_duplicates']:,} nearly repeat another listed pair",
        *([found["texts"]] if found["texts"] else []),
    ]
    for line in lines:
        screen.print(Text(safe(line)))
    rows = [[r["row_id"], r["finding"], _confidence(r["confidence"]), r["copies"]] for r in found["first"]]
    screen.print(table(("row", "finding", "confidence", "copies"), rows, left=2))
    screen.print(Text(f"all of them, for review: {safe(found['file'])}"))


def _confidence(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
