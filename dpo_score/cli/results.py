"""The commands that read results: finish, compare, report, audit. No command here loads a model."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Slices = Annotated[
    list[str] | None, typer.Option("--slice", metavar="COL", help="also by this column, length or turns; repeatable")
]
Out = Annotated[str, typer.Argument(metavar="OUT", help="folder that a run wrote")]


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this file on `app`."""
    for command in (finish, compare, report, audit):
        app.command()(command)


def finish(
    out: Out,
    without: Annotated[list[str] | None, typer.Option(metavar="NAME", help="leave a policy out; repeatable")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="as for run")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="as for run")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="only warnings and errors")] = False,
    as_json: AsJson = False,
) -> None:
    """After `run --blocks 0/N … N-1/N`: check that every block is there; summary, card and report.

    What the shares were allowed is not taken from OUT: say --allow-pickle or --trust-remote-code again."""
    from dpo_score.cli import console as show
    from dpo_score.engine.executors import job_array as shares
    from dpo_score.engine.progress import Progress

    given = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    allowed = [name for name, said in given.items() if said]
    outcome = shares.finish(out, Progress(quiet), without or [], allowed)
    show.outcome(outcome, as_json=as_json)
    outcome.raise_failures()


def compare(
    out: Out,
    other: Annotated[str | None, typer.Argument(metavar="[OUT_B]", help="a second folder")] = None,
    policies: Annotated[str | None, typer.Option(help="all, or a comma list of names")] = None,
    baseline: Annotated[str | None, typer.Option(help="the policy that the others are set against")] = None,
    fail_if: Annotated[
        list[str] | None, typer.Option(help="exit 5 when it holds: 'diff.accuracy.high < 0'; repeatable")
    ] = None,
    slices: Slices = None,
    as_json: AsJson = False,
) -> None:
    """Which policy is better, pair by pair, with intervals and adjusted p values.

    --fail-if: [diff.]METRIC[group].bound OP NUMBER, joined by and / or. METRIC: accuracy, margins, margins_nats, loss,
    chosen_rewards, rejected_rewards. Group: a subset, worst_subset or COL=GROUP of a --slice. Bound: low, high,
    p. NUMBER: or baseline."""
    from dpo_score.cli import console_compare as show_compare
    from dpo_score.results import compare as pairwise

    found = pairwise.compare([out, *([other] if other else [])], policies, baseline, fail_if or [], slices or [])
    show_compare.compared(found, as_json=as_json)
    pairwise.raise_failed(found)


def report(
    out: Out,
    baseline: Annotated[str | None, typer.Option(help="the policy that the others are set against")] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="leave texts out, and number groups of texts")] = False,
    format_: Annotated[str, typer.Option("--format", help="html, or tables on standard output: md, csv, tex")] = "html",
    slices: Slices = None,
    as_json: AsJson = False,
) -> None:
    """OUT/report.html: verdict, curves, subsets, margins, length, what changed, worst pairs, labels in doubt."""
    from dpo_score.cli import console_compare as show_compare
    from dpo_score.report import build as page

    if format_ != "html":
        typer.echo(page.tables(out, format_, baseline, slices or [], no_text))
        return
    where, found = page.report(out, no_text=no_text, baseline=baseline, slices=slices or [])
    show_compare.compared(found, as_json=as_json)
    if not as_json:
        typer.echo(f"report: {where}")


def audit(
    out: Out,
    policies: Annotated[str | None, typer.Option(help="all, or a comma list of names")] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="leave the texts of pairs out")] = False,
    as_json: AsJson = False,
) -> None:
    """Labels worth a second look: pairs that every policy ranks against the label, as OUT/audit.parquet."""
    from dpo_score.cli import console as show
    from dpo_score.results import audit as labels

    show.audited(labels.audit(out, policies, no_text), as_json=as_json)
