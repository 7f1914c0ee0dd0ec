"""A comparison on a terminal: the sentence, then compact tables with small histograms. Nothing here computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from dpo_score.cli.console import console, number, print_json, share, table
from dpo_score.escape import safe
from dpo_score.metrics.sentences import p_value
from dpo_score.report.tables import SLICE_METRICS as MEANS

Found = Mapping[str, Any]
BARS = " ▁▂▃▄▅▆▇█"


def compared(found: Found, as_json: bool = False) -> None:
    """Print a compare_policies."""
    if as_json:
        print_json(found)
        return
    screen = console()
    for line in summary_lines(found):
        screen.print(Text(safe(line)), soft_wrap=False)
    screen.print()
    screen.print(table(("policy", "accuracy", "ties", "margin", "nats", "loss", _span(found)), _levels(found)))
    for heading, rows in _difference_tables(found):
        screen.print(Text(f"\n{safe(heading)}", style="bold"))
        screen.print(table(HEADS, rows))
    for heading, rows in _slices(found):
        screen.print(Text(f"\n{safe(heading)}", style="bold"))
        screen.print(table(SLICE_HEADS, rows, left=3))
    for line in failures(found):
        screen.print(Text(safe(line), style="bold"))


def summary_lines(found: Found) -> Iterator[str]:
    yield str(found["sentence"])
    note = f"{found['pairs']:,} pairs in common"
    if found["groups"] < found["pairs"]:
        note += f", in {found['groups']:,} groups that share a prompt or group (intervals allow for it)"
    yield note
    for side in found["one_sided"]:
        pairs = f"pairs only {side['policy']} has" if len(found["policies"]) == 2 else _not_shared(side["policy"])
        yield f"left out: {side['pairs']:,} {pairs} (row {', '.join(side['first'])} …)"


def _not_shared(policy: str) -> str:
    return f"pairs of {policy} that not all others have"


def _span(found: Found) -> str:
    edges = found["margin_edges"]
    return f"margins {edges[0]:.2f} … {edges[-1]:.2f}"


def _levels(found: Found) -> list[list[object]]:
    return [
        [
            policy["name"],
            share(policy["accuracy"]),
            policy["ties"],
            *(number(policy[metric]["mean"]) for metric in ("margins", "margins_nats", "loss")),
            sparkline(policy["histogram"]),
        ]
        for policy in found["policies"]
    ]


def sparkline(counts: Sequence[int]) -> str:
    """Counts as a line of block characters; what is there at all is at least one eighth high."""
    top = max([*counts, 1])
    return "".join(BARS[0 if not count else max(1, round(count / top * (len(BARS) - 1)))] for count in counts)


HEADS = ("policy", "difference", "p", "adjusted p", "won", "lost", "detectable")


def _difference_tables(found: Found) -> Iterator[tuple[str, list[list[object]]]]:
    items = found["versus_best"].get("accuracy", [])
    if items and found["best"] != found["baseline"]:
        yield f"accuracy against the best, {found['best']} (points)", [_line(item, 100.0) for item in items]
    for metric, items in found["versus_baseline"].items():
        unit = (100.0, " (points)") if metric == "accuracy" else (1.0, "")
        yield f"{metric} against {found['baseline']}{unit[1]}", [_line(item, unit[0]) for item in items]


def _line(item: Found, scale: float) -> list[object]:
    if item["mean"] is None:
        return [item["policy"], item.get("reason") or "-", "", "", "", "", ""]
    ci95, detectable = item["ci95"], item["detectable"]
    interval = "" if ci95 is None else f" [{scale * ci95[0]:+.2f}, {scale * ci95[1]:+.2f}]"
    return [
        item["policy"],
        f"{scale * item['mean']:+.2f}{interval}",
        p_value(item["p"]),
        p_value(item["p_adjusted"]),
        item["won"],
        item["lost"],
        "-" if detectable is None else f"{scale * detectable:.2f}",
    ]


SLICE_HEADS = ("", "pairs", "policy", "accuracy", "margin", "nats", "loss", "chosen", "rejected")


def _slices(found: Found) -> Iterator[tuple[str, list[list[object]]]]:
    """A table for each slice, a line for each group and policy."""
    for column, one in found["slices"].items():
        yield f"by {column} ({one['cut']})", [line for item in one["groups"].items() for line in _group(*item)]


def _group(name: str, group: Found) -> Iterator[list[object]]:
    heads = [name, f"{group['pairs']:,}"]
    for policy, cell in group["policies"].items():
        yield [*heads, policy, share(cell["accuracy"]), *(number(cell[metric]["mean"]) for metric in MEANS)]
        heads = ["", ""]


def failures(found: Found) -> Iterator[str]:
    for sentence in found.get("failed", ()):
        yield f"fail-if: {sentence}"
