"""Which blocks of a stage are due: what is found committed is proved, the rest is cleared away or set aside.

A block costs a record and the files it names, read whole; several are looked at together, since an object store
answers in tens of milliseconds. The decision itself is `resume.next_action`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial

from dpo_score.data.dataset import DataFile
from dpo_score.engine.context import RunContext
from dpo_score.engine.plan import RowBlocks, RunPlan
from dpo_score.engine.stages import part
from dpo_score.engine.threads import map_threads
from dpo_score.errors import DataError
from dpo_score.storage.base import Store
from dpo_score.storage.commits import StoredRecord, StoredRecords, read_records, record_name
from dpo_score.storage.resume import (
    Action,
    BlockRange,
    FileState,
    file_states,
    missing_rows,
    next_action,
    settle,
)

Look = tuple[int, StoredRecord | None, Action]


def pending_blocks(context: RunContext, plan: RunPlan, stage: str, identity: str, folders: Sequence[str]) -> list[int]:
    """Blocks to compute, after every found block was skipped, cleared or set aside.

    `folders`: where the stage puts its parts. IdentityError when a block belongs to another request; Interrupted.
    """
    records, blocks, due = read_records(context.store, stage), plan.rows.blocks, []
    there = {name for folder in folders for name in context.store.list(folder)}
    look = partial(_look, context.store, plan, identity, records, stage)
    with closing(map_threads(look, plan.rows, context.store.width)) as looks:
        for block, record, action in context.stop.between(looks):
            outputs = [name for folder in folders if (name := part(folder, block, blocks)) in there]
            if record is not None or outputs:
                _settle(context, record_name(stage, block, blocks), action, record, outputs)
            if action is not Action.SKIP:
                due.append(block)
    return due


def _look(store: Store, plan: RunPlan, identity: str, records: StoredRecords, stage: str, block: int) -> Look:
    blocks = plan.rows.blocks
    record = records.get(record_name(stage, block, blocks))
    return block, record, next_action(identity, plan.rows.range(block), record, file_states(store, record))


def missing_of(store: Store, rows: RowBlocks, stage: str, prove: bool = False) -> list[tuple[int, int]]:
    """Row ranges of a stage that are wanted and not committed; none means that the stage is complete.

    `prove`: also reads the files that the records name; else the records alone decide.
    """
    records = read_records(store, stage)

    def look(block: int) -> tuple[BlockRange, StoredRecord | None, Sequence[FileState]]:
        record = records.get(record_name(stage, block, rows.blocks))
        return rows.range(block), record, file_states(store, record) if prove else ()

    with closing(map_threads(look, rows, store.width)) as looks:
        return missing_rows(looks)


def _settle(
    context: RunContext, name: str, action: Action, record: StoredRecord | None, outputs: Sequence[str]
) -> None:
    warning = settle(context.store, name, action, record, outputs)
    if warning:
        context.progress.warn(warning)


# --- input check ------------------------------------------------------------


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
