"""The commands that tell at once what there is: status, formats, cache. They load no more than they print."""

from __future__ import annotations

from typing import Annotated

import typer

from dpo_score.cli import console
from dpo_score.cli.options import AsJson, CacheDir, Out
from dpo_score.data.formats.registry import describe_formats
from dpo_score.engine.progress import Progress
from dpo_score.results import cache_admin
from dpo_score.results import status as state

cache = typer.Typer(help="Log-probs by content, shared by all runs.", no_args_is_help=True, add_completion=False)


def status(out: Out, as_json: AsJson = False) -> None:
    """What OUT holds: blocks done, rows, rejects, identities."""
    console.status(state.status(out), as_json=as_json)


def formats(as_json: AsJson = False) -> None:
    """The shapes of preference data that are recognised, and which side each takes as better."""
    console.formats(describe_formats(), as_json=as_json)


@cache.command("ls")
def cache_ls(cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """Models whose log-probs are kept: entries, bytes."""
    console.cache(cache_admin.ls(cache_dir), as_json=as_json)


@cache.command("verify")
def cache_verify(cache_dir: CacheDir = None) -> None:
    """Read every entry; exit 4 names each damaged file. Nothing is moved: the next run sets such files aside."""
    console.lines([cache_admin.verify(cache_dir, Progress().reading)])


@cache.command("gc")
def cache_gc(
    cache_dir: CacheDir = None,
    max_age_days: Annotated[float | None, typer.Option(help="drop what was written longer ago")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="drop the oldest beyond this size")] = None,
) -> None:
    """Drop old entries, by the time they were written; runs that need them compute them again."""
    console.lines([cache_admin.gc(cache_dir, max_age_days, max_bytes)])
