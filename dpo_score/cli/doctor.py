"""`dpo-score doctor`: the findings as a table, or as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from dpo_score.cli.console import console, print_json, table
from dpo_score.cli.options import AsJson, CacheDir
from dpo_score.engine.doctor import Status, examine
from dpo_score.escape import safe


def doctor(
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="also: what `auto` picks for this model, and why")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N, mps")] = "auto",
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """What this machine can do for a run: processor, GPUs, kernels, compiler, memory; exit 1 when a run would fail.

    Takes about a minute at most and changes nothing."""
    found = examine(reference, device, cache_dir)
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        screen = console()
        rows = [[safe(f.what), safe(f.seen), str(f.status)] for f in found]
        screen.print(table(("check", "seen", ""), rows, left=3))
        for finding in found:
            if finding.way_out:
                screen.print(Text(f"{finding.status}: {safe(finding.what)}: {safe(finding.way_out)}"))
    if any(finding.status is Status.PROBLEM for finding in found):
        raise typer.Exit(1)
