"""The `dpo-score` command: parse, call one function, print.

Promises: errors are one paragraph on standard error with the exit code of `errors.py`, never a traceback for a
user's mistake; `--max_length` and `--max-length` are one option; only the commands that run a model import torch.
"""

from __future__ import annotations

import inspect as signatures
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dpo_score.cli import export as cli_share
from dpo_score.cli import results as cli_results
from dpo_score.cli import select as cli_select
from dpo_score.config.schema import BY_NAME, OPTIONS, Option
from dpo_score.errors import DpoScoreError
from dpo_score.escape import safe

app = typer.Typer(
    name="dpo-score",
    help="Score preference pairs for Direct Preference Optimization: reference log-probs, losses, rewards, margins.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)
CPU_RUNTIME = {
    # on a shared machine, threads that spin while they wait cost a factor of ten
    "OMP_WAIT_POLICY": "PASSIVE",
    # generated kernels are kept per shape, 1,024 of them by default: half a gigabyte that grows for the first hour
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
"""Read by OpenMP and oneDNN when torch is imported; what the user has set stands."""
cache_app = typer.Typer(help="Log-probs by content, shared by all runs.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
cli_results.add_commands(app)
cli_select.add_commands(app)
cli_share.add_commands(app)

Out = Annotated[str, typer.Argument(metavar="OUT", help="folder that a run wrote")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", help="only warnings and errors")]


def _parameter(option: Option) -> signatures.Parameter:
    flags = (f"{option.flag}/--no-{option.flag[2:]}",) if option.type is bool else (option.flag,)
    declaration = typer.Option(*flags, help=option.help, rich_help_panel=option.panel)
    annotation = Annotated[option.type | None, declaration]  # type: ignore[name-defined]
    return signatures.Parameter(option.name, signatures.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Add every option of `options.OPTIONS` to a command; it receives those that were set as one dictionary."""
    own = [p for p in signatures.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
    table = [_parameter(option) for option in OPTIONS]

    def wrapped(**values: Any) -> None:
        settings = {name: values.pop(name) for name in list(values) if name in BY_NAME}
        command(settings={k: v for k, v in settings.items() if v is not None}, **values)

    parameters = sorted([*own, *table], key=lambda p: p.kind)
    wrapped.__signature__ = signatures.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


Pipeline = Annotated[str | None, typer.Argument(metavar="[PIPELINE.yaml]", help="a pipeline file; options override it")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done; score nothing")]
Restart = Annotated[bool, typer.Option("--restart", help="throw away what OUT holds and begin again")]


@app.command()
@with_settings
def run(
    settings: dict[str, Any],
    pipeline: Pipeline = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    probe: Annotated[bool, typer.Option("--probe", help="score three packs; print rows/s and hours")] = False,
    price_per_hour: Annotated[float | None, typer.Option(help="with --probe: print money, too")] = None,
    by_subset: Annotated[bool, typer.Option("--by-subset", help="a table line per subset, too")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="ask nothing")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Both stages: cache what the reference lacks, stream every policy, write scores and a summary.

    The same command again resumes."""
    from dpo_score.cli import console as show
    from dpo_score.config.load import load_config
    from dpo_score.engine import dry_run as preview
    from dpo_score.engine.executors import choose as engines
    from dpo_score.engine.progress import Progress

    config, progress = load_config(pipeline, settings), Progress(quiet)
    if dry_run or probe:
        show.preview(preview.probe(config, progress, price_per_hour) if probe else preview.dry_run(config, progress))
        return
    outcome = engines.run(config, progress, restart=restart)
    if config.blocks is None:
        show.outcome(outcome, as_json=as_json, by_subset=by_subset)
    outcome.raise_failures()


@app.command()
@with_settings
def precompute(
    settings: dict[str, Any],
    pipeline: Pipeline = None,
    to: Annotated[str, typer.Option("--to", help="columns of which consumer: trl, ids")] = "trl",
    rename: Annotated[str | None, typer.Option(help="output columns by other names: ref_chosen_logps=a,…")] = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Stage one alone: fill the cache and, with --out, write the data set with reference log-probs."""
    from dpo_score.cli import console as show
    from dpo_score.config.load import load_config
    from dpo_score.engine import dry_run as preview
    from dpo_score.engine.progress import Progress
    from dpo_score.export import precompute as stage

    config, progress = load_config(pipeline, settings), Progress(quiet)
    if dry_run:
        show.preview(preview.dry_run(config, progress))
        return
    outcome = stage.precompute(config, progress, restart=restart, to=to, rename=rename)
    show.precomputed(outcome, as_json=as_json)
    outcome.raise_failures()


@app.command()
def rescore(
    out: Out,
    loss: Annotated[str, typer.Option(help="losses, a comma list")] = "sigmoid",
    beta: Annotated[str | None, typer.Option(help="betas, a comma list")] = None,
    label_smoothing: Annotated[float | None, typer.Option()] = None,
    loss_param: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; repeatable")] = None,
    reference_policy: Annotated[
        str | None, typer.Option(help="a scored policy that takes the reference's place")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Any grid of losses and betas from the stored log-probs: no model, no GPU."""
    from dpo_score.cli import console as show
    from dpo_score.results import rescore as grid

    show.rescored(grid.rescore(out, loss, beta, label_smoothing, loss_param or [], reference_policy), as_json=as_json)


@app.command()
def status(out: Out, as_json: AsJson = False) -> None:
    """What OUT holds: blocks done, rows, rejects, identities."""
    from dpo_score.cli import console as show
    from dpo_score.results import status as state

    show.status(state.status(out), as_json=as_json)


@app.command()
def verify(
    out: Out,
    against: Annotated[str | None, typer.Option(help="trl: re-score rows with TRL's own code")] = None,
    n: Annotated[int, typer.Option("-n", help="rows for --against")] = 32,
    loss_file: Annotated[list[str] | None, typer.Option(metavar="FILE", help="a custom loss's; repeatable")] = None,
    as_json: AsJson = False,
) -> None:
    """Re-prove counts, checksums and derived columns; exit 4 names each damaged file. Runs no code that OUT names.

    --loss-file: your file of a custom loss, run to recompute it where its sha256 is the stored one.
    --against trl scores sampled rows again with the installed TRL, on the reference's weights."""
    from dpo_score.cli import console as show
    from dpo_score.results.verify import verify as proof

    findings = proof.verify(out, loss_file or [])
    if against is not None and not findings.damage:
        from dpo_score.integrations.trl_check import comparison

        findings.against = comparison(out, against, n)
    show.verified(findings, as_json=as_json)
    findings.raise_damage()


@app.command()
@with_settings
def inspect(
    settings: dict[str, Any],
    target: Annotated[str, typer.Argument(metavar="DATA|OUT", help="a data file, or a folder that a run wrote")],
    row: Annotated[int, typer.Option("--row", help="row number, from 0")] = 0,
) -> None:
    """The pair as the model sees it: tokens, which are scored (coloured), the boundary."""
    from dpo_score.cli import inspect as view

    view.inspect(target, row, settings)


@app.command()
def formats(as_json: AsJson = False) -> None:
    """The shapes of preference data that are recognised, and which side each takes as better."""
    from dpo_score.cli import console as show
    from dpo_score.data.formats.registry import describe_formats

    show.formats(describe_formats(), as_json=as_json)


@cache_app.command("ls")
def cache_ls(cache_dir: Annotated[str | None, typer.Option()] = None, as_json: AsJson = False) -> None:
    """Models whose log-probs are kept: entries, bytes."""
    from dpo_score.cli import console as show
    from dpo_score.results import cache_admin as cachework

    show.cache(cachework.ls(cache_dir), as_json=as_json)


@cache_app.command("verify")
def cache_verify(cache_dir: Annotated[str | None, typer.Option()] = None) -> None:
    """Read every entry; exit 4 names each damaged file. Nothing is moved: the next run sets such files aside."""
    from dpo_score.results import cache_admin as cachework

    typer.echo(cachework.verify(cache_dir))


@cache_app.command("gc")
def cache_gc(
    cache_dir: Annotated[str | None, typer.Option()] = None,
    max_age_days: Annotated[float | None, typer.Option(help="drop what was written longer ago")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="drop the oldest beyond this size")] = None,
) -> None:
    """Drop old entries, by the time they were written; runs that need them compute them again."""
    from dpo_score.results import cache_admin as cachework

    typer.echo(cachework.gc(cache_dir, max_age_days, max_bytes))


def main(argv: list[str] | None = None) -> None:
    """Entry point: the exit code is that of the error."""
    for name, value in CPU_RUNTIME.items():
        os.environ.setdefault(name, value)
    arguments = [_dashed(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    try:
        app(arguments)
    except DpoScoreError as error:
        typer.echo(f"error: {safe(error, keep_newlines=True)}", err=True)
        raise SystemExit(error.exit_code) from None


def _dashed(argument: str) -> str:
    """`--max_length=5` is `--max-length=5`; values and single-letter options stay as typed."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
