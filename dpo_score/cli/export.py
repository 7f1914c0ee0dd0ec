"""The commands that hand results on: export, push."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_score.cli import console
from dpo_score.cli.options import AsJson, Out, Quiet
from dpo_score.engine.progress import Progress
from dpo_score.export import hub, rewardbench
from dpo_score.export.precompute import export_run

Folder = Annotated[str | None, typer.Option("--out", metavar="DIR", help="where to write")]


def export(
    out: Out,
    to: Annotated[str, typer.Option("--to", help="trl, ids or rewardbench")],
    folder: Folder = None,
    rename: Annotated[str | None, typer.Option(help="trl, ids: output columns by other names: OLD=NEW,…")] = None,
    versus: Annotated[
        str | None, typer.Option(metavar="OUT", help="rewardbench: another run's table, and the difference")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Results in the form that another program reads: TRL's columns, token ids, RewardBench's JSON."""
    if to == "rewardbench":
        _rewardbench(out, folder, versus, as_json)
        return
    outcome = export_run(out, to, folder, rename, Progress(quiet))
    console.precomputed(outcome, as_json=as_json)
    outcome.raise_failures()


def _rewardbench(out: str, folder: str | None, versus: str | None, as_json: bool) -> None:
    found = rewardbench.differences(out, versus) if versus else []
    written = rewardbench.export(out, folder)
    if as_json:
        tables = [{"policy": name, "here": here, "there": there} for name, here, there in found]
        console.print_json({"files": written, "versus": tables})
        return
    for name, here, there in found:
        console.benchmark_difference(name, here, there)
    console.lines(written)


def push(
    out: Out,
    to: Annotated[str, typer.Option("--to", metavar="OWNER/NAME", help="data-set repository on the hub")],
    exclude: Annotated[list[str] | None, typer.Option(help="file names to leave out (*, ?); repeatable")] = None,
    public: Annotated[bool, typer.Option("--public", help="a repository made now is public")] = False,
    revision: Annotated[str | None, typer.Option(help="branch to commit to")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="send; without it, say only what would be sent")] = False,
    as_json: AsJson = False,
) -> None:
    """Send a finished folder to the Hugging Face hub; without --yes only say what would be sent."""
    found = hub.plan(out, to, exclude=exclude or [], public=public, revision=revision)
    commit = hub.push(found) if yes else None
    if as_json:
        console.print_json({**found.to_json(), "commit": commit})
        return
    console.lines([*found.lines(), f"sent: {commit}" if yes else "nothing was sent: --yes sends it"])
