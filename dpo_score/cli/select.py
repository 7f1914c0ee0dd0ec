"""`dpo-score select`: which pairs to train on."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_score.cli.options import AsJson, Out, Quiet

Rule = Annotated[
    str,
    typer.Option(
        "--rule",
        "--rules",
        help="margin:high, margin:low, margin:band=LOW,HIGH, difficulty, dual, agree[=K], suspect[=K], on-policy, "
        "random, an expression over stored columns ('margins > 0 AND chosen_tokens < 300'), or all: compare them",
    ),
]
Keep = Annotated[str | None, typer.Option(metavar="N|P%", help="how many pairs, or a share of the scored ones")]
To = Annotated[str | None, typer.Option(metavar="DIR", help="write the kept pairs as a data set, and why")]
Judges = Annotated[list[str] | None, typer.Option(metavar="NAME", help="judges; default: all; repeatable")]
PerToken = Annotated[bool, typer.Option("--per-token", help="margins per token instead of sums")]
Scaled = Annotated[bool, typer.Option("--scaled", help="margins times beta instead of nats")]
BySubset = Annotated[bool, typer.Option("--by-subset", help="keep the same share of every subset")]
LengthMatch = Annotated[bool, typer.Option("--length-match", help="keep the same share of every length difference")]
Dedupe = Annotated[bool, typer.Option("--dedupe", help="of prompts that are nearly the same, keep one")]
ScoreColumns = Annotated[
    str | None, typer.Option(metavar="CHOSEN,REJECTED", help="dual: stored columns with outside scores")
]
FoldColumn = Annotated[str | None, typer.Option(metavar="COLUMN", help="stored column with the fold of each pair")]
PolicyOfFold = Annotated[
    str | None, typer.Option(metavar="FOLD=NAME,…", help="which policy did not train on which fold")
]
Seed = Annotated[int, typer.Option(help="of random, and of ties in a score")]


def select(
    out: Out,
    rule: Rule,
    keep: Keep = None,
    to: To = None,
    policy: Judges = None,
    per_token: PerToken = False,
    scaled: Scaled = False,
    by_subset: BySubset = False,
    length_match: LengthMatch = False,
    dedupe: Dedupe = False,
    score_columns: ScoreColumns = None,
    folds: FoldColumn = None,
    policy_of_fold: PolicyOfFold = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Which pairs to train on: keep a share of them by a rule, or compare all rules. Loads no model.

    Pairs of one prompt stay together. With --to DIR: the data set of the kept pairs with its reference log-probs,
    selection.parquet (every row of OUT and why it is kept or not) and selection.json."""
    from dpo_score.cli import console
    from dpo_score.errors import ConfigError
    from dpo_score.results import select as selecting

    request = selecting.Request(
        rule=rule,
        keep=keep,
        policies=policy,
        per_token=per_token,
        scaled=scaled,
        by_subset=by_subset,
        length_match=length_match,
        dedupe=dedupe,
        score_columns=selecting.parse_score_columns(score_columns),
        folds=selecting.parse_folds(folds, policy_of_fold),
        seed=seed,
    )
    if rule.strip() == "all":
        if to is not None:
            raise ConfigError("--rule all compares the rules and writes no data set: choose one rule for --to")
        console.rules_compared(selecting.compare(out, request), as_json=as_json)
        return
    found, written = selecting.select(out, request), None
    if to is not None:
        from dpo_score.engine.progress import Progress
        from dpo_score.export.selected import write_selection

        written = write_selection(out, found, to, Progress(quiet))
    console.selected(found.summary, written, as_json=as_json)
