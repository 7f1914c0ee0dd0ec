"""The commands that read and judge what a run wrote. None loads a model, but for `verify --against`."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_score.cli import console
from dpo_score.cli.options import AsJson, Out, Slices
from dpo_score.engine.progress import Progress
from dpo_score.report import build as page
from dpo_score.results import audit as labels
from dpo_score.results import compare as pairwise
from dpo_score.results import rescore as grid
from dpo_score.results.verify import verify as proof

Policies = Annotated[str | None, typer.Option(help="all, or a comma list of names")]
Baseline = Annotated[str | None, typer.Option(help="the policy that the others are set against")]


def verify(
    out: Out,
    against: Annotated[str | None, typer.Option(help="trl: re-score rows with TRL's own code")] = None,
    n: Annotated[int, typer.Option("-n", help="rows for --against")] = 32,
    loss_file: Annotated[list[str] | None, typer.Option(metavar="FILE", help="a custom loss's; repeatable")] = None,
    as_json: AsJson = False,
) -> None:
    """Prove counts, checksums and derived columns again; exit 4 names each damaged file. Runs no code that OUT names.

    --loss-file: your file of a custom loss, run to recompute it where its sha256 is the stored one.
    --against trl scores sampled rows again with the installed TRL, on the reference's weights."""
    findings = proof.verify(out, loss_file or [], Progress().reading)
    if against is not None and not findings.damage:
        from dpo_score.integrations.trl_check import comparison  # torch

        findings.against = comparison(out, against, n)
    console.verified(findings, as_json=as_json)
    findings.raise_damage()


def report(
    out: Out,
    baseline: Baseline = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="leave texts out, and number groups of texts")] = False,
    format_: Annotated[str, typer.Option("--format", help="html, or tables on standard output: md, csv, tex")] = "html",
    slices: Slices = None,
    as_json: AsJson = False,
) -> None:
    """OUT/report.html: conclusion, curves, subsets, margins, length, what changed, worst pairs, labels in doubt."""
    if format_ != "html":
        typer.echo(page.tables(out, format_, baseline, slices or [], no_text))
        return
    where, found = page.report(out, no_text=no_text, baseline=baseline, slices=slices or [], reading=Progress().reading)
    console.compared(found, as_json=as_json)
    if not as_json:
        console.lines([f"report: {where}"])


def compare(
    out: Out,
    other: Annotated[str | None, typer.Argument(metavar="[OUT_B]", help="a second folder")] = None,
    policies: Policies = None,
    baseline: Baseline = None,
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
    folders = [out, *([other] if other else [])]
    found = pairwise.compare(folders, policies, baseline, fail_if or [], slices or [], Progress().reading)
    console.compared(found, as_json=as_json)
    pairwise.raise_failed(found)


def rescore(
    out: Out,
    loss: Annotated[str, typer.Option(help="losses, a comma list")] = "sigmoid",
    beta: Annotated[str | None, typer.Option(help="betas, a comma list")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="share of labels taken to be wrong")] = None,
    loss_param: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; repeatable")] = None,
    reference_policy: Annotated[
        str | None, typer.Option(help="a scored policy that takes the reference's place")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Any grid of losses and betas from the stored log-probs: no model, no GPU."""
    found = grid.rescore(out, loss, beta, label_smoothing, loss_param or [], reference_policy, Progress().reading)
    console.rescored(found, as_json=as_json)


def audit(
    out: Out,
    policies: Policies = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="leave the texts of pairs out")] = False,
    as_json: AsJson = False,
) -> None:
    """Labels worth a second look: pairs that every policy ranks against the label, as OUT/audit.parquet."""
    console.audited(labels.audit(out, policies, no_text, Progress().reading), as_json=as_json)
