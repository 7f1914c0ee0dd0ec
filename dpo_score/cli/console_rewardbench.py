"""RewardBench's table on a terminal: a line per policy, sections as columns. Nothing here computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from dpo_score.cli.console import console, percent, table
from dpo_score.escape import safe
from dpo_score.metrics.rewardbench import PRIOR, SECTIONS

Cell = Mapping[str, Any]


def benchmark(summary: Cell) -> None:
    """Sections and leaderboard average of every policy, and RewardBench 2's subsets, where the run has them."""
    policies = {n: p["rewardbench"] for n, p in summary["policies"].items() if "rewardbench" in p}
    pairs = {name: found for name, found in policies.items() if found.get("sections")}
    if pairs:
        heads = [name for name in (*SECTIONS, PRIOR) if any(name in found["sections"] for found in pairs.values())]
        rows = [
            [name, *_shares(found["sections"], heads), percent(found["leaderboard"])] for name, found in pairs.items()
        ]
        _print("RewardBench", next(iter(pairs.values())), [*heads, "average"], rows)
    lists = {name: found for name, found in policies.items() if "best_of_n" in found}
    if lists:
        heads = list(next(iter(lists.values()))["best_of_n"]["subsets"])
        _print(
            "RewardBench 2",
            next(iter(lists.values())),
            [*heads, "average"],
            [_list_line(n, f, heads) for n, f in lists.items()],
        )


def _print(title: str, found: Cell, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    screen = console()
    screen.print(Text(f"{title}, {found['mode']}, score: {safe(found['score'])}"))
    screen.print(table(["policy", *(safe(head) for head in heads)], rows))


def _shares(cells: Cell, heads: Sequence[str]) -> list[str]:
    return [percent(cells.get(head)) for head in heads]


def _list_line(name: str, found: Cell, heads: Sequence[str]) -> list[str]:
    cells = found["best_of_n"]
    scores = {head: cell["score"] for head, cell in cells["subsets"].items()}
    return [name, *_shares(scores, heads), percent(cells["average"])]


def difference(policy: str, ours: Cell, theirs: Cell) -> None:
    """Two runs' tables of one policy, and their difference in percentage points, section by section."""
    heads = [name for name in (*SECTIONS, PRIOR) if name in ours["sections"] and name in theirs["sections"]]
    rows = [_against(name, ours["sections"][name], theirs["sections"][name]) for name in heads]
    rows.append(_against("average", ours["leaderboard"], theirs["leaderboard"]))
    screen = console()
    screen.print(Text(f"{safe(policy)}: {ours['mode']} against {theirs['mode']}"))
    screen.print(table(["section", ours["mode"], theirs["mode"], "points"], rows))


def _against(name: str, ours: float | None, theirs: float | None) -> list[str]:
    points = "-" if ours is None or theirs is None else f"{100 * (ours - theirs):+.2f}"
    return [name, percent(ours), percent(theirs), points]
