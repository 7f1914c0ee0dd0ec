"""The commands that read results or tell what is known. None loads a model, but for `verify --against`."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_score.cli.options import AsJson, CacheDir, Out, Quiet, Slices

Policies = Annotated[str | None, typer.Option(help="all, or a comma list of names")]
Baseline = Annotated[str | None, typer.Option(help="the policy that the others are set against")]


def finish(
    out: Out,
    without: Annotated[list[str] | None, typer.Option(metavar="NAME", help="leave a policy out; repeatable")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="as for run")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="as for run")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """After `run --blocks 0/N … N-1/N`: check that every block is there; summary, card and report.

    What the shares were allowed is not taken from OUT: say --allow-pickle or --trust-remote-code again."""
    from dpo_score.cli import console
    from dpo_score.engine.executors import job_array
    from dpo_score.engine.progress import Progress

    given = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    allowed = [name for name, said in given.items() if said]
    outcome = job_array.finish(out, Progress(quiet), without or [], allowed)
    console.outcome(outcome, as_json=as_json)
    outcome.raise_failures()


def status(out: Out, as_json: AsJson = False) -> None:
    """What OUT holds: blocks done, rows, rejects, identities."""
    from dpo_score.cli import console
    from dpo_score.results import status as state

    console.status(state.status(out), as_json=as_json)


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
    from dpo_score.cli import console
    from dpo_score.results.verify import verify as proof

    findings = proof.verify(out, loss_file or [])
    if against is not None and not findings.damage:
        from dpo_score.integrations.trl_check import comparison

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
    """OUT/report.html: verdict, curves, subsets, margins, length, what changed, worst pairs, labels in doubt."""
    from dpo_score.cli import console
    from dpo_score.report import build as page

    if format_ != "html":
        typer.echo(page.tables(out, format_, baseline, slices or [], no_text))
        return
    where, found = page.report(out, no_text=no_text, baseline=baseline, slices=slices or [])
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
    from dpo_score.cli import console
    from dpo_score.results import compare as pairwise

    found = pairwise.compare([out, *([other] if other else [])], policies, baseline, fail_if or [], slices or [])
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
    from dpo_score.cli import console
    from dpo_score.results import rescore as grid

    found = grid.rescore(out, loss, beta, label_smoothing, loss_param or [], reference_policy)
    console.rescored(found, as_json=as_json)


def audit(
    out: Out,
    policies: Policies = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="leave the texts of pairs out")] = False,
    as_json: AsJson = False,
) -> None:
    """Labels worth a second look: pairs that every policy ranks against the label, as OUT/audit.parquet."""
    from dpo_score.cli import console
    from dpo_score.results import audit as labels

    console.audited(labels.audit(out, policies, no_text), as_json=as_json)


def formats(as_json: AsJson = False) -> None:
    """The shapes of preference data that are recognised, and which side each takes as better."""
    from dpo_score.cli import console
    from dpo_score.data.formats.registry import describe_formats

    console.formats(describe_formats(), as_json=as_json)


def cache_ls(cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """Models whose log-probs are kept: entries, bytes."""
    from dpo_score.cli import console
    from dpo_score.results import cache_admin

    console.cache(cache_admin.ls(cache_dir), as_json=as_json)


def cache_verify(cache_dir: CacheDir = None) -> None:
    """Read every entry; exit 4 names each damaged file. Nothing is moved: the next run sets such files aside."""
    from dpo_score.cli import console
    from dpo_score.results import cache_admin

    console.lines([cache_admin.verify(cache_dir)])


def cache_gc(
    cache_dir: CacheDir = None,
    max_age_days: Annotated[float | None, typer.Option(help="drop what was written longer ago")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="drop the oldest beyond this size")] = None,
) -> None:
    """Drop old entries, by the time they were written; runs that need them compute them again."""
    from dpo_score.cli import console
    from dpo_score.results import cache_admin

    console.lines([cache_admin.gc(cache_dir, max_age_days, max_bytes)])
