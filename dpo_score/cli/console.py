"""All that commands print on standard output: tables for people, strict JSON for programs. Nothing here computes.

The only place that prints tables. Text of data reaches the terminal through `escape.safe` alone. On a terminal that is
too narrow for every column, the less important columns are left out and a line says where they are; names of policies
are broken at `-`, `.`, `_` and `/`, never within a word; what a terminal's encoding lacks is replaced by ASCII.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_score.escape import safe
from dpo_score.metrics.compare import LEAST_RANKED
from dpo_score.metrics.rewardbench import PRIOR, SECTIONS
from dpo_score.metrics.sentences import p_value
from dpo_score.storage.open import open_store
from dpo_score.storage.resume import row_ranges

if TYPE_CHECKING:
    from dpo_score.engine.finish import Outcome
    from dpo_score.export.precompute import PrecomputeOutcome

Cell = Mapping[str, Any]
"""One entry of summary.json or of a comparison."""
WIDE = 116
"""Columns of text that every table fits into. Where the output is no terminal, tables are this wide at least."""
NAME_WIDTH = 24
_BARS = " ▁▂▃▄▅▆▇█"


def console() -> Console:
    """Standard output without markup, emoji or automatic links: what is printed is what was meant."""
    found = Console(markup=False, emoji=False, highlight=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found.width = max(found.width, WIDE)
    return found


def is_plain(screen: Console) -> bool:
    """Whether colours cannot carry meaning: a pipe, or NO_COLOR."""
    return screen.color_system is None or screen.no_color


def print_json(value: Any) -> None:
    """Strict JSON, ASCII, sorted keys."""
    print(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def lines(found: Iterable[str]) -> None:
    """One line after another, made safe."""
    screen = console()
    for line in found:
        screen.print(Text(safe(line)), soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> Table:
    """A plain table; the first `left` columns are text, the others are numbers."""
    found = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        is_text = index < left
        found.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for row in rows:
        found.add_row(*(Text(safe(cell, keep_newlines=True)) for cell in row))
    return found


def fitted_table(
    screen: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    left: int = 1,
    spare: Sequence[str] = (),
    elsewhere: str = "",
) -> None:
    """Print a table. Of `spare`, columns are left out from the first on until it fits; `elsewhere` says where to look.

    Names in the first `left` columns are broken into lines of NAME_WIDTH characters where the terminal is narrow.
    """
    kept, dropped, made = list(range(len(columns))), [], table(columns, rows, left)
    attempts = [(None, 0), (None, NAME_WIDTH), *((name, NAME_WIDTH) for name in spare), (None, NAME_WIDTH // 2)]
    for name, width in attempts:
        if name is not None:
            kept.remove(columns.index(name))
            dropped.append(name)
        cells = [[row[index] for index in kept] for row in rows]
        if width:
            cells = [[*(broken_name(str(cell), width) for cell in row[:left]), *row[left:]] for row in cells]
        made = table([columns[index] for index in kept], cells, left)
        if _width(screen, made) <= screen.width:
            break
    screen.print(made)
    if dropped:
        listed = ", ".join(dropped)
        screen.print(Text(f"left out on {screen.width} columns: {listed}{elsewhere}", style="dim"))


def _width(screen: Console, made: Table) -> int:
    return screen.measure(made, options=screen.options.update(width=10_000)).maximum


def broken_name(name: str, width: int = NAME_WIDTH) -> str:
    """`name` in lines of at most `width` characters where it can be broken after `-`, `.`, `_`, `/` or a space."""
    if len(name) <= width:
        return name
    found = [""]
    for part in re.findall(r"[^-._/ ]+[-._/ ]*|[-._/ ]+", name):
        if found[-1] and len(found[-1]) + len(part) > width:
            found.append("")
        found[-1] += part
    return "\n".join(found)


# --- numbers ----------------------------------------------------------------------------------------------------------


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


def sparkline(counts: Sequence[int]) -> str:
    """Counts as a line of block characters; what is there at all is at least one eighth high."""
    top = max([*counts, 1])
    return "".join(_BARS[0 if not count else max(1, round(count / top * (len(_BARS) - 1)))] for count in counts)


# --- run --------------------------------------------------------------------------------------------------------------

_RUN = ("policy", "data", "n", "loss", "accuracy", "margin", "nats", "chosen", "rejected", "ref. alone")
_RUN_SPARE = ("ref. alone", "rejected", "chosen", "nats")


def outcome(found: Outcome, as_json: bool = False, by_subset: bool = False) -> None:
    """The table of a run: a line per policy and data set (and subset), then where the files are."""
    if as_json:
        print_json(found.summary)
        return
    screen, policies = console(), found.summary["policies"]
    best = _best(policies)
    rows = [row for name, policy in policies.items() for row in _run_rows(name, policy, by_subset, name == best)]
    elsewhere = " (in summary.json and report.html)"
    if rows:
        fitted_table(screen, _RUN, rows, left=2, spare=_RUN_SPARE, elsewhere=elsewhere)
    if best is not None:
        compared_by = f"dpo-score compare {found.out} --policies all"
        screen.print(Text(safe(f"* highest accuracy; whether others are worse: {compared_by}")), soft_wrap=True)
    for heading, groups in _run_slices(policies):
        screen.print(Text(f"by {safe(heading)}", style="bold"))
        fitted_table(screen, ("policy", "group", *_RUN[2:]), groups, left=2, spare=_RUN_SPARE, elsewhere=elsewhere)
    for name, policy in policies.items():
        codes = policy["overall"]["rejected"]
        if codes:
            listed = ", ".join(f"{count} {code}" for code, count in codes.items())
            screen.print(Text(f"{safe(name)}: not scored: {safe(listed)} (rejects/ says which and why)"))
    for name, reason in found.summary["skipped"].items():
        screen.print(Text(safe(f"{name}: skipped, not whole yet (the same command scores it once it is): {reason}")))
    benchmark(found.summary)
    screen.print(Text(f"results in {safe(found.out)}: {', '.join(_written(found.out))}"), soft_wrap=True)


def _written(out: str) -> list[str]:
    """What a person may open first, of what is there."""
    store = open_store(out)
    names = [name for name in ("summary.json", "report.html") if store.exists(name)]
    return ["scores/<policy>/*.parquet", *names]


def _best(policies: Mapping[str, Cell]) -> str | None:
    """The policy of the highest accuracy, where there are several and one alone has it, ranked as `compare` does."""
    found: dict[str, float | None] = {}
    for name, policy in policies.items():
        cell = policy["overall"]
        enough = cell["accuracy"]["n"] >= LEAST_RANKED * (cell["scored"] - cell["labelled_ties"])
        found[name] = cell["accuracy"]["value"] if enough else None
    known = {name: value for name, value in found.items() if value is not None}
    top = [name for name, value in known.items() if value == max(known.values())]
    return top[0] if len(policies) > 1 and len(top) == 1 else None


def _run_rows(name: str, policy: Cell, by_subset: bool, is_best: bool) -> Iterator[list[str]]:
    label = f"{name} *" if is_best else name
    for dataset, cell in policy["datasets"].items():
        yield _run_row(label, dataset, cell)
        if by_subset:
            for subset, found in policy["subsets"].get(dataset, {}).items():
                yield _run_row("", f"  {subset}", found)
    if len(policy["datasets"]) > 1:
        yield _run_row(label, "all", policy["overall"])


def _run_slices(policies: Cell) -> Iterator[tuple[str, list[list[str]]]]:
    """A table for each --slice: how it was cut, and a line for each policy and group."""
    cuts = {column: cut["how"] for policy in policies.values() for column, cut in policy["slice_cuts"].items()}
    for column, how in cuts.items():
        found = {name: policy["slices"].get(column, {}) for name, policy in policies.items()}
        rows = [_run_row(name, group, cell) for name, groups in found.items() for group, cell in groups.items()]
        yield f"{column} ({how})", rows


def _run_row(name: str, label: str, cell: Cell) -> list[str]:
    means = [cell[key]["mean"] for key in ("margins", "margins_nats", "chosen_rewards", "rejected_rewards")]
    alone = cell["ranking"]["reference_sum"]["value"]
    scored, loss = f"{cell['scored']:,}", number(cell["loss"]["mean"])
    return [name, label, scored, loss, share(cell["accuracy"]), *map(number, means), percent(alone)]


def preview(found: Mapping[str, Any]) -> None:
    """A dry run or a probe: one line a fact."""
    for key, value in found.items():
        lines(f"{key:<14} {line}" for line in (value if isinstance(value, list) else [value]))


def precomputed(found: PrecomputeOutcome, as_json: bool = False) -> None:
    if as_json:
        print_json(found.summary)
        return
    lines(found.lines())


# --- RewardBench ------------------------------------------------------------------------------------------------------


def benchmark(summary: Cell) -> None:
    """RewardBench's sections and average of every policy, and RewardBench 2's subsets, where a run has them."""
    policies = {n: p["rewardbench"] for n, p in summary["policies"].items() if "rewardbench" in p}
    if not policies:
        return
    pairs = {name: found for name, found in policies.items() if found.get("sections")}
    if pairs:
        heads = [name for name in (*SECTIONS, PRIOR) if any(name in found["sections"] for found in pairs.values())]
        rows = [
            [name, *(percent(found["sections"].get(head)) for head in heads), percent(found["leaderboard"])]
            for name, found in pairs.items()
        ]
        _benchmark_table("RewardBench", next(iter(pairs.values())), heads, rows)
    lists = {name: found["best_of_n"] for name, found in policies.items() if "best_of_n" in found}
    if lists:
        heads = list(next(iter(lists.values()))["subsets"])
        rows = [
            [name, *(percent(found["subsets"].get(head, {}).get("score")) for head in heads), percent(found["average"])]
            for name, found in lists.items()
        ]
        _benchmark_table("RewardBench 2", policies[next(iter(lists))], heads, rows)


def _benchmark_table(title: str, found: Cell, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    screen = console()
    screen.print(Text(f"{title}, {found['mode']}, score: {safe(found['score'])}"))
    screen.print(table(["policy", *(safe(head) for head in heads), "average"], rows))


def benchmark_difference(policy: str, ours: Cell, theirs: Cell) -> None:
    """Two runs' RewardBench tables of one policy, and their difference in percentage points, section by section."""
    rows = []
    names = [name for name in (*SECTIONS, PRIOR) if name in ours["sections"] and name in theirs["sections"]]
    pairs = [(name, ours["sections"][name], theirs["sections"][name]) for name in names]
    for name, here, there in (*pairs, ("average", ours["leaderboard"], theirs["leaderboard"])):
        points = "-" if here is None or there is None else f"{100 * (here - there):+.2f}"
        rows.append([name, percent(here), percent(there), points])
    screen = console()
    screen.print(Text(f"{safe(policy)}: {ours['mode']} against {theirs['mode']}"))
    screen.print(table(["section", ours["mode"], theirs["mode"], "points"], rows))


# --- compare ----------------------------------------------------------------------------------------------------------

_DIFFERENCES = ("policy", "difference", "p", "adjusted p", "won", "lost", "detectable")
_GROUPS = ("", "pairs", "policy", "accuracy", "margin", "nats", "loss", "chosen", "rejected")


def compared(found: Cell, as_json: bool = False) -> None:
    """A comparison: the sentence, the policies, then differences against the best and the baseline."""
    if as_json:
        print_json(found)
        return
    screen = console()
    elsewhere = " (in `report` and with --json)"
    for line in summary_lines(found):
        screen.print(Text(safe(line)), soft_wrap=False)
    screen.print()
    edges = found["margin_edges"]
    span = f"margins {edges[0]:.2f} … {edges[-1]:.2f}"
    heads = ("policy", "accuracy", "ties", "margin", "nats", "loss", span)
    rows = [_level(policy, policy["name"] == found["best"]) for policy in found["policies"]]
    fitted_table(screen, heads, rows, spare=("nats", span, "ties", "loss"), elsewhere=elsewhere)
    if found["best"] is not None and len(found["policies"]) > 1:
        screen.print(Text("* highest accuracy"))
    for heading, differences in _difference_tables(found):
        screen.print(Text(f"\n{safe(heading)}", style="bold"))
        fitted_table(screen, _DIFFERENCES, differences, spare=("detectable", "p", "won", "lost"), elsewhere=elsewhere)
    by_dataset = {"dataset": {"cut": "each by itself; above they are pooled", "groups": found["subsets"]["dataset"]}}
    shown = by_dataset if len(found["subsets"]["dataset"]) > 1 and "dataset" not in found["slices"] else {}
    for column, one in (shown | found["slices"]).items():
        screen.print()
        screen.print(Text(safe(f"by {column} ({one['cut']})"), style="bold"))
        groups = [row for item in one["groups"].items() for row in _group_rows(*item)]
        spare = ("chosen", "rejected", "nats", "loss")
        fitted_table(screen, _GROUPS, groups, left=3, spare=spare, elsewhere=elsewhere)


def summary_lines(found: Cell) -> Iterator[str]:
    """What the comparison found in a sentence, and which pairs it is about."""
    yield str(found["sentence"])
    note = f"{found['pairs']:,} pairs in common"
    if found["groups"] < found["pairs"]:
        note += f", in {found['groups']:,} groups that share a prompt or group (intervals allow for it"
        note += f"; they count as about {found['effective_groups']:.1f} of equal size)"
    yield note
    yield from found.get("notes", ())
    for side in found["one_sided"]:
        name = side["policy"]
        only = len(found["policies"]) == 2
        pairs = f"pairs only {name} has" if only else f"pairs of {name} that not all others have"
        yield f"left out: {side['pairs']:,} {pairs} (row {', '.join(side['first'])} …)"


def _level(policy: Cell, is_best: bool) -> list[object]:
    means = [number(policy[metric]["mean"]) for metric in ("margins", "margins_nats", "loss")]
    name = f"{policy['name']} *" if is_best else policy["name"]
    return [name, share(policy["accuracy"]), policy["ties"], *means, sparkline(policy["histogram"])]


def _difference_tables(found: Cell) -> Iterator[tuple[str, list[list[object]]]]:
    items = found["versus_best"].get("accuracy", [])
    if items and found["best"] != found["baseline"]:
        yield f"accuracy against the best, {found['best']} (points)", [_difference(item, 100.0) for item in items]
    for metric, items in found["versus_baseline"].items():
        scale, unit = (100.0, " (points)") if metric == "accuracy" else (1.0, "")
        yield f"{metric} against {found['baseline']}{unit}", [_difference(item, scale) for item in items]


def _difference(item: Cell, scale: float) -> list[object]:
    if item["mean"] is None:
        return [item["policy"], item.get("reason") or "-", "", "", "", "", ""]
    ci95, detectable = item["ci95"], item["detectable"]
    interval = "" if ci95 is None else f" [{scale * ci95[0]:+.2f}, {scale * ci95[1]:+.2f}]"
    smallest = "-" if detectable is None else f"{scale * detectable:.2f}"
    p_values = (p_value(item["p"]), p_value(item["p_adjusted"]))
    return [item["policy"], f"{scale * item['mean']:+.2f}{interval}", *p_values, item["won"], item["lost"], smallest]


def _group_rows(name: str, group: Cell) -> Iterator[list[object]]:
    """A line for each policy in one group of a slice."""
    metrics = ("margins", "margins_nats", "loss", "chosen_rewards", "rejected_rewards")
    heads = [name, f"{group['pairs']:,}"]
    for policy, cell in group["policies"].items():
        yield [*heads, policy, share(cell["accuracy"]), *(number(cell[metric]["mean"]) for metric in metrics)]
        heads = ["", ""]


# --- select -----------------------------------------------------------------------------------------------------------

_RULES = ("rule", "kept", "accuracy", "nats", "length", "suspect", "learnt", "as random")
_RULES_SAY = (
    "accuracy: ranked as labelled by the policies · nats: mean margin · length: chosen minus rejected tokens · "
    "suspect: every policy disagrees with the label · learnt: DPO weight under 0.1 · as random: also kept by chance"
)
_NEAR = {
    "chosen": "chosen, nats/token",
    "rejected": "rejected, nats/token",
    "displaced": "displaced",
    "saturated": "learnt",
}


def selected(summary: Cell, written: str | None, as_json: bool = False) -> None:
    """What one rule keeps and leaves out, who judged, and where the data set is."""
    if as_json:
        print_json({**summary, "written": written})
        return
    counts = dict(summary["counts"])
    kept = counts.pop("kept", 0)
    threshold = "" if summary["threshold"] is None else f", lowest score {summary['threshold']:.4g}"
    left = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items())
    where = "nothing was written: --to DIR writes the data set of the kept pairs, and why each row is in or out"
    if written is not None:
        where = f"{written}: data/, selection.parquet, selection.json, README.md; load_dataset finds it"
    lines(
        [
            f"{summary['rule']} keeps {kept:,} of {summary['rows']:,} rows{threshold}: {summary['keeps']}",
            *([f"left out: {left}"] if left else []),
            f"judges: {', '.join(summary['policies'])} ({summary['judged']}); source of the rule: {summary['source']}",
            where,
        ]
    )


def rules_compared(found: Cell, as_json: bool = False) -> None:
    """Every rule on the same pairs: what it keeps, how far rules agree, what they would teach, and the diagnosis."""
    if as_json:
        print_json(found)
        return
    screen, elsewhere = console(), " (with --json)"
    judges = f"{', '.join(found['policies'])} ({found['judged']})"
    lines([f"each rule keeps {found['keep']:,} of {found['scored']:,} scored pairs; judges: {judges}"])
    rows = [_rule(rule) for rule in (*found["rules"], {"rule": "(all pairs)", **found["all"]})]
    fitted_table(screen, _RULES, rows, spare=("as random", "learnt", "suspect"), elsewhere=elsewhere)
    screen.print(Text(_RULES_SAY, style="dim"))
    screen.print(Text("\nshare of a rule's pairs that another rule keeps too", style="bold"))
    applied = {rule["rule"]: rule["overlap"] for rule in found["rules"] if "overlap" in rule}
    overlaps = [[name, *(percent(overlap[other]) for other in applied)] for name, overlap in applied.items()]
    fitted_table(screen, ("rule", *applied), overlaps, spare=tuple(applied)[::-1], elsewhere=elsewhere)
    screen.print(Text("\nwhat training on them would teach", style="bold"))
    lines(f"{rule['rule']}: {rule.get('teaches') or rule.get('reason')}" for rule in found["rules"])
    screen.print(Text("\nhow near the pairs lie to each policy", style="bold"))
    last = list(found["on_policy"])[-1]
    subsets = {f"  {last}: {name}": cell for name, cell in found["on_policy"][last]["subsets"].items()}
    near = [[name, *(_near(key, cell[key]) for key in _NEAR)] for name, cell in (found["on_policy"] | subsets).items()]
    fitted_table(screen, ("policy", *_NEAR.values()), near, elsewhere=elsewhere)
    for key, word in _NEAR.items():
        screen.print(Text(f"{word.partition(',')[0]}: {found['definitions'][key]}", style="dim"))


def _rule(rule: Cell) -> list[object]:
    if "accuracy" not in rule:
        return [rule["rule"], 0, *["-"] * (len(_RULES) - 2)]
    nats, length = rule["margins_nats"]["value"], rule["length_difference"]["value"]
    return [
        rule["rule"],
        f"{rule['kept']:,}",
        share(rule["accuracy"]),
        "-" if nats is None else f"{nats:.2f}",
        "-" if length is None else f"{length:+.0f}",
        share(rule["suspect"]),
        share(rule["saturated"]),
        percent(rule.get("overlap", {}).get("random")),
    ]


def _near(key: str, cell: Cell) -> str:
    """A share with its interval, or nats per token."""
    return share(cell) if key in ("displaced", "saturated") else number(cell["value"])


# --- other commands that read results ---------------------------------------------------------------------------------


def rescored(found: Mapping[str, Any], as_json: bool = False) -> None:
    """The grid of losses and betas, a line each per policy."""
    if as_json:
        print_json(found)
        return
    rows = []
    for row in found["rows"]:
        means = (number(row["loss"]), share(row["accuracy"]), number(row["margins"]))
        rows.append([row["policy"], row["loss_name"], f"{row['beta']:g}", row["n"], *means])
    heads = ("policy", "loss", "beta", "n", "mean loss", "accuracy", "margin")
    fitted_table(console(), heads, rows, left=2, spare=("n", "mean loss"), elsewhere=" (with --json)")
    other = found["reference_policy"]
    lines(f"{name}: {n:,} pairs left out, which {other} did not score" for name, n in found["left_out"].items())
    lines([f"per pair: {found['folder']}"])


def status(found: Mapping[str, Any], as_json: bool = False) -> None:
    if as_json:
        print_json(found)
        return
    lines([f"{found['out']}: {found['state']}; {found['total_rows']:,} rows"])
    rows = [[s["stage"], f"{s['done']}/{s['blocks']}", s["rows"], s["scored"], s["rejected"]] for s in found["stages"]]
    fitted_table(console(), ("stage", "blocks", "rows", "scored", "rejected"), rows)
    for stage in found["stages"]:
        if stage["missing"]:
            lacking = row_ranges([(start, stop) for start, stop in stage["missing"]])
            lines([f"{stage['stage']}: {lacking} are not scored yet, counted from 0"])
    lines(f"warning: {warning}" for warning in found["warnings"])


def verified(found: Any, as_json: bool = False) -> None:
    if as_json:
        print_json(found.to_json())
        return
    lines(found.lines())


def audited(found: Mapping[str, Any], as_json: bool = False) -> None:
    """Labels in doubt: counts, the first pairs, where the file is."""
    if as_json:
        print_json(found)
        return
    voters = f"every policy ({len(found['policies'])}) ranks"
    lines(
        [
            f"{found['ranked_against']:,} of {found['pairs']:,} pairs are those that {voters} against the label",
            f"{found['identical_answers']:,} pairs have identical answers; of the listed ones "
            f"{found['near_identical']:,} have nearly the same answers and {found['near_duplicates']:,} nearly repeat "
            "another listed pair",
            *([found["texts"]] if found["texts"] else []),
        ]
    )
    rows = [[r["row_id"], r["finding"], number(r["confidence"]), r["copies"]] for r in found["first"]]
    fitted_table(console(), ("row", "finding", "confidence", "copies"), rows, left=2)
    lines([f"all of them, for review: {found['file']}"])


def formats(found: Sequence[Mapping[str, Any]], as_json: bool = False) -> None:
    if as_json:
        print_json(list(found))
        return
    rows = [
        ["/".join(filter(None, (item["name"], item["variant"]))), item["code"], item["columns"], item["polarity"]]
        for item in found
    ]
    console().print(table(("format", "", "columns", "which side is better"), rows, left=4))


def cache(found: Sequence[Mapping[str, Any]], as_json: bool = False) -> None:
    if as_json:
        print_json(list(found))
        return
    if not found:
        lines(["the cache is empty"])
        return
    heads = list(found[0])
    fitted_table(console(), heads, [[item[name] for name in heads] for item in found])
