"""`dpo-score select`: the command and the tables it prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer
from rich.text import Text

from dpo_score.cli.console import console, lines, print_json, table
from dpo_score.cli.options import AsJson, Out, Quiet
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError
from dpo_score.escape import safe
from dpo_score.export.selected import write_selection
from dpo_score.results import select as selecting

HEADS = ("rule", "kept", "accuracy", "nats", "length", "suspect", "learnt", "as random")
LEGEND = (
    "accuracy: ranked as labelled by the policies · nats: mean margin · length: chosen minus rejected tokens · "
    "suspect: every policy disagrees with the label · learnt: DPO weight under 0.1 · as random: also kept by chance"
)


def select(
    out: Out,
    rule: Annotated[
        str,
        typer.Option(
            "--rule",
            "--rules",
            help="margin:high, margin:low, margin:band=LOW,HIGH, difficulty, dual, agree[=K], suspect[=K], on-policy, "
            "random, an expression over stored columns ('margins > 0 AND chosen_tokens < 300'), or all: compare them",
        ),
    ],
    keep: Annotated[
        str | None, typer.Option(metavar="N|P%", help="how many pairs, or a share of the scored ones")
    ] = None,
    to: Annotated[str | None, typer.Option(metavar="DIR", help="write the kept pairs as a data set, and why")] = None,
    policy: Annotated[list[str] | None, typer.Option(metavar="NAME", help="judges; default: all; repeatable")] = None,
    per_token: Annotated[bool, typer.Option("--per-token", help="margins per token instead of sums")] = False,
    scaled: Annotated[bool, typer.Option("--scaled", help="margins times beta instead of nats")] = False,
    by_subset: Annotated[bool, typer.Option("--by-subset", help="keep the same share of every subset")] = False,
    length_match: Annotated[
        bool, typer.Option("--length-match", help="keep the same share of every length difference")
    ] = False,
    dedupe: Annotated[bool, typer.Option("--dedupe", help="of prompts that are nearly the same, keep one")] = False,
    score_columns: Annotated[
        str | None, typer.Option(metavar="CHOSEN,REJECTED", help="dual: stored columns with outside scores")
    ] = None,
    folds: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="stored column with the fold of each pair")
    ] = None,
    policy_of_fold: Annotated[
        str | None, typer.Option(metavar="FOLD=NAME,…", help="which policy did not train on which fold")
    ] = None,
    seed: Annotated[int, typer.Option(help="of random, and of ties in a score")] = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Which pairs to train on: keep a share of them by a rule, or compare all rules. Loads no model.

    Pairs of one prompt stay together. With --to DIR: the data set of the kept pairs with its reference log-probs,
    selection.parquet (every row of OUT and why it is kept or not) and selection.json."""
    request = selecting.Request(
        rule,
        keep,
        ",".join(policy) if policy else None,
        per_token,
        scaled,
        by_subset,
        length_match,
        dedupe,
        score_columns,
        folds,
        policy_of_fold,
        seed,
    )
    if rule.strip() == "all":
        if to is not None:
            raise ConfigError("--rule all compares the rules and writes no data set: choose one rule for --to")
        _compared(selecting.compare(out, request), as_json)
        return
    found = selecting.select(out, request)
    written = None
    if to is not None:
        written = write_selection(out, found, to, Progress(quiet))
    _selected(found.summary, written, as_json)


def _selected(summary: Mapping[str, Any], written: str | None, as_json: bool) -> None:
    if as_json:
        print_json({**summary, "written": written})
        return
    lines(_selected_lines(summary, written))


def _selected_lines(summary: Mapping[str, Any], written: str | None) -> Iterable[str]:
    counts = dict(summary["counts"])
    kept = counts.pop("kept", 0)
    threshold = "" if summary["threshold"] is None else f", lowest score {summary['threshold']:.4g}"
    yield f"{summary['rule']} keeps {kept:,} of {summary['rows']:,} rows{threshold}: {summary['keeps']}"
    left = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.items())
    if left:
        yield f"left out: {left}"
    yield f"judges: {', '.join(summary['policies'])} ({summary['judged']}); source of the rule: {summary['source']}"
    if written is None:
        yield "nothing was written: --to DIR writes the data set of the kept pairs, and why each row is in or out"
    else:
        yield f"{written}: data/, selection.parquet, selection.json, README.md; load_dataset finds it"


def _compared(found: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    screen = console()
    screen.print(
        Text(f"each rule keeps {found['keep']:,} of {found['scored']:,} scored pairs; judges: {_judges(found)}")
    )
    names = [rule["rule"] for rule in found["rules"] if "overlap" in rule]
    rows = [_measured(rule) for rule in found["rules"]]
    screen.print(table(HEADS, [*rows, _measured({"rule": "(all pairs)", **found["all"]})]))
    screen.print(Text(LEGEND, style="dim"))
    screen.print(Text("\nshare of a rule's pairs that another rule keeps too", style="bold"))
    overlaps = [[rule["rule"], *(_percent(rule["overlap"][name]) for name in names)] for rule in _applied(found)]
    screen.print(table(("rule", *names), overlaps))
    screen.print(Text("\nwhat training on them would teach", style="bold"))
    for rule in found["rules"]:
        screen.print(Text(safe(f"{rule['rule']}: {rule.get('teaches') or rule.get('reason')}")))
    screen.print(Text("\nhow near the pairs lie to each policy", style="bold"))
    heads = ("policy", "chosen, nats/token", "rejected, nats/token", "displaced", "learnt")
    screen.print(table(heads, [_near(name, cell) for name, cell in found["on_policy"].items()]))
    screen.print(
        Text("displaced: the chosen answer became less likely although the margin grew (arXiv 2410.08847)", style="dim")
    )


def _judges(found: Mapping[str, Any]) -> str:
    return f"{safe(', '.join(found['policies']))} ({safe(found['judged'])})"


def _applied(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [rule for rule in found["rules"] if "overlap" in rule]


def _measured(rule: Mapping[str, Any]) -> list[object]:
    if "accuracy" not in rule:
        return [rule["rule"], 0, *["-"] * (len(HEADS) - 2)]
    overlap = rule.get("overlap", {}).get("random")
    return [
        rule["rule"],
        rule["kept"],
        _percent(rule["accuracy"]["value"]),
        _number(rule["margins_nats"]["value"], ".2f"),
        _number(rule["length_difference"]["value"], "+.0f"),
        _percent(rule["suspect"]["value"]),
        _percent(rule["saturated"]["value"]),
        _percent(overlap),
    ]


def _near(name: str, cell: Mapping[str, Any]) -> list[object]:
    return [
        name,
        _number(cell["chosen"]["value"], ".2f"),
        _number(cell["rejected"]["value"], ".2f"),
        _percent(cell["displaced"]["value"]),
        _percent(cell["saturated"]["value"]),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
