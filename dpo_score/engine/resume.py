"""What is left to compute: blocks that are missing or do not hold, and data files that changed meanwhile."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import closing

from dpo_score.data.dataset import DataFile
from dpo_score.engine.context import RunContext
from dpo_score.engine.plan import RowBlocks, RunPlan, Task
from dpo_score.engine.threads import map_threads
from dpo_score.errors import DataError
from dpo_score.storage.commits import StoredRecord, read_records, record_name
from dpo_score.storage.resume import (
    Action,
    BlockRange,
    FileState,
    file_states,
    missing_rows,
    next_action,
    settle,
)
from dpo_score.storage.stage import Stage, part_file


def pending_blocks(context: RunContext, plan: RunPlan, task: Task) -> list[int]:
    """Blocks of one task to compute. What is found committed is proved against its record; what does not hold is set
    aside, what belongs to no record is deleted.

    IdentityError when a block belongs to another request; Interrupted. Several blocks are looked at together, since an
    object store answers in tens of milliseconds. The decision itself is `storage.resume.next_action`.
    """
    store, stage, blocks = context.store, task.stage, plan.rows.blocks
    records = read_records(store, stage.name)
    there = {name for folder in stage.folders for name in store.list(folder)}

    def look(block: int) -> tuple[int, StoredRecord | None, Action]:
        record = records.get(record_name(stage.name, block, blocks))
        return block, record, next_action(task.identity, plan.rows.range(block), record, file_states(store, record))

    pending = []
    with closing(map_threads(look, plan.rows, store.width)) as looks:
        for block, record, action in context.stop.between(looks):
            outputs = [name for folder in stage.folders if (name := part_file(folder, block, blocks)) in there]
            if record is not None or outputs:
                warning = settle(store, record_name(stage.name, block, blocks), action, record, outputs)
                if warning:
                    context.progress.warn(warning)
            if action is not Action.SKIP:
                pending.append(block)
    return pending


def missing_of(context: RunContext, rows: RowBlocks, stage: Stage, prove: bool = False) -> list[tuple[int, int]]:
    """Row ranges of a stage that are wanted and not committed; none means that the stage is complete.

    `prove`: also reads the files that the records name; else the records alone decide. Raises Interrupted.
    """
    store = context.store
    records = read_records(store, stage.name)

    def look(block: int) -> tuple[BlockRange, StoredRecord | None, Sequence[FileState]]:
        record = records.get(record_name(stage.name, block, rows.blocks))
        return rows.range(block), record, file_states(store, record) if prove else ()

    with closing(map_threads(look, rows, store.width)) as looks:
        return missing_rows(context.stop.between(looks))


def refuse_changed_input(context: RunContext, plan: RunPlan, start: int, stop: int) -> None:
    """DataError when a file behind the wanted rows [start, stop) is not the one that the run began with.

    Files that these rows do not come from are not looked at: a block costs the same among a thousand files.
    """
    for file in files_behind(plan, start, stop):
        if context.file_hashes.sha256(file.path) != file.sha256:
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
