"""Data files that change while they are read: what was read of them is not committed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from dpo_score.data.dataset import DataFile
from dpo_score.engine.context import RunContext
from dpo_score.engine.plan import RunPlan
from dpo_score.errors import DataError


def refuse_changed_input(context: RunContext, plan: RunPlan, start: int, stop: int) -> None:
    """DataError when a file behind the wanted rows [start, stop) is not the one that the run began with.

    Files that these rows do not come from are not looked at: a block costs the same among a thousand files.
    """
    for file in files_behind(plan, start, stop):
        if context.digests.sha256(file.path) != file.sha256:
            raise DataError(f"{file.path} changed while it was being scored: run the same command with --restart")


def files_behind(plan: RunPlan, start: int, stop: int) -> Iterator[DataFile]:
    """The files that hold the wanted rows [start, stop), in order."""
    sample = plan.rows.sample
    rows: Sequence[int] = range(start, stop) if sample is None else sample[start:stop]
    first = 0
    for file in (file for dataset in plan.datasets for file in dataset.files):
        if _any_within(rows, first, first + file.rows):
            yield file
        first += file.rows


def _any_within(rows: Sequence[int], start: int, stop: int) -> bool:
    """Whether one of the ascending `rows` lies in [start, stop)."""
    at = bisect_left(rows, start)
    return at < len(rows) and rows[at] < stop
