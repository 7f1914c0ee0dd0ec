"""Which blocks of a stage are due: what is found committed is proved, the rest is cleared away or set aside.

A block costs a record and the files it names, read whole; several are looked at together, since an object store
answers in tens of milliseconds. The decision itself is `resume.next_action`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial

from dpo_score.engine.context import Desk
from dpo_score.engine.plan import Job, Rows
from dpo_score.engine.stages import part
from dpo_score.engine.threads import at_once
from dpo_score.storage.commits import StoredRecord, StoredRecords, read_records, record_name
from dpo_score.storage.io import Store
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


def due_blocks(desk: Desk, job: Job, stage: str, identity: str, folders: Sequence[str]) -> list[int]:
    """Blocks to compute, after every found block was skipped, cleared or set aside.

    `folders`: where the stage puts its parts. IdentityError when a block belongs to another request; Interrupted.
    """
    records, blocks, due = read_records(desk.store, stage), job.rows.blocks, []
    there = {name for folder in folders for name in desk.store.list(folder)}
    look = partial(_look, desk.store, job, identity, records, stage)
    with closing(at_once(look, job.rows, desk.store.width)) as looks:
        for block, record, action in desk.stop.between(looks):
            outputs = [name for folder in folders if (name := part(folder, block, blocks)) in there]
            if record is not None or outputs:
                _settle(desk, record_name(stage, block, blocks), action, record, outputs)
            if action is not Action.SKIP:
                due.append(block)
    return due


def _look(store: Store, job: Job, identity: str, records: StoredRecords, stage: str, block: int) -> Look:
    blocks = job.rows.blocks
    record = records.get(record_name(stage, block, blocks))
    return block, record, next_action(identity, job.rows.range(block), record, file_states(store, record))


def missing_of(store: Store, rows: Rows, stage: str, prove: bool = False) -> list[tuple[int, int]]:
    """Row ranges of a stage that are wanted and not committed; none means that the stage is complete.

    `prove`: also reads the files that the records name; else the records alone decide.
    """
    records = read_records(store, stage)

    def look(block: int) -> tuple[BlockRange, StoredRecord | None, Sequence[FileState]]:
        record = records.get(record_name(stage, block, rows.blocks))
        return rows.range(block), record, file_states(store, record) if prove else ()

    with closing(at_once(look, rows, store.width)) as looks:
        return missing_rows(looks)


def _settle(desk: Desk, name: str, action: Action, record: StoredRecord | None, outputs: Sequence[str]) -> None:
    warning = settle(desk.store, name, action, record, outputs)
    if warning:
        desk.progress.warn(warning)
