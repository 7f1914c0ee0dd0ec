"""What a run does with each block it finds: skip, redo, refuse or quarantine. The decision is pure.

    record     identity   rows                                 files      action
    none       ·          ·                                    ·          REDO (files without a record are deleted)
    damaged    ·          ·                                    ·          QUARANTINE, then redo
    there      differs    ·                                    ·          REFUSE
    there      equal      another start, or other block count  ·          REFUSE
    there      equal      ends earlier than asked (--limit)    ·          REDO
    there      equal      ends where asked, or later           all sound  SKIP
    there      equal      ends where asked, or later           missing or altered    QUARANTINE, then redo

A block that holds more rows than a later --limit asks for is kept: committed work is never recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from dpo_score.errors import IdentityError
from dpo_score.storage.base import FileRecord, Store
from dpo_score.storage.commits import CommitRecord, DamagedRecord, StoredRecord


class Action(Enum):
    SKIP = "skip"
    REDO = "redo"
    REFUSE = "refuse"
    QUARANTINE = "quarantine"


class FileState(Enum):
    """A file against its record."""

    SOUND = "sound"
    MISSING = "missing"
    ALTERED = "altered"


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Rows [start, stop) of the whole data: block `block` of `blocks`."""

    block: int
    blocks: int
    start: int
    stop: int


def block_count(rows: int, block_rows: int) -> int:
    """Blocks of `block_rows` rows that `rows` rows make: at least one."""
    return max(-(-rows // block_rows), 1)


def missing_rows(
    expected: Iterable[tuple[BlockRange, StoredRecord | None, Sequence[FileState]]],
) -> list[tuple[int, int]]:
    """Row ranges [start, stop) that are asked for and not committed; a stage is complete when there are none.

    `expected`: of every block the rows asked for, its record, and the states of the record's files where they were
    looked at. A block that ends early (--limit) misses the rest; one whose record or files are damaged misses all.
    """
    missing: list[tuple[int, int]] = []
    for rows, record, files in expected:
        start = rows.start
        if isinstance(record, CommitRecord) and all(state is FileState.SOUND for state in files):
            start = max(record.stop, rows.start)
        if start >= rows.stop:
            continue
        if missing and missing[-1][1] == start:
            start = missing.pop()[0]
        missing.append((start, rows.stop))
    return missing


def row_ranges(ranges: Sequence[tuple[int, int]], shown: int = 8) -> str:
    """Row ranges in words, counted from 0: `rows 10 to 19, 30 to 39`."""
    if not ranges:
        return "no rows"
    texts = [f"{start:,} to {stop - 1:,}" if stop - start > 1 else f"{start:,}" for start, stop in ranges[:shown]]
    more = f" and {len(ranges) - shown:,} more ranges" if len(ranges) > shown else ""
    return f"rows {', '.join(texts)}{more}"


def next_action(identity: str, expected: BlockRange, record: StoredRecord | None, files: Sequence[FileState]) -> Action:
    """The table above."""
    if record is None:
        return Action.REDO
    if isinstance(record, DamagedRecord):
        return Action.QUARANTINE
    if record.identity != identity:
        return Action.REFUSE
    if (record.block, record.blocks, record.start) != (expected.block, expected.blocks, expected.start):
        return Action.REFUSE
    if record.stop < expected.stop:
        return Action.REDO
    return Action.SKIP if all(state is FileState.SOUND for state in files) else Action.QUARANTINE


def file_state(store: Store, file: FileRecord) -> FileState:
    """Compare one file with its record: size, then sha256."""
    found = store.stat(file.name)
    if found is None:
        return FileState.MISSING
    if found.size != file.size or store.sha256(file.name) != file.sha256:
        return FileState.ALTERED
    return FileState.SOUND


def file_states(store: Store, record: StoredRecord | None) -> tuple[FileState, ...]:
    """States of the files that `record` names, in its order."""
    if not isinstance(record, CommitRecord):
        return ()
    return tuple(file_state(store, file) for file in record.files)


def settle(store: Store, name: str, action: Action, record: StoredRecord | None, outputs: Sequence[str]) -> str | None:
    """Bring a block to the state `action` asks for; after REDO and QUARANTINE it can be computed anew.

    `name` is its record's name, `outputs` the data files it would write. The record goes before the files, so a
    crash in between leaves files without a record. Returns a warning when something was quarantined.
    Raises IdentityError on REFUSE.
    """
    if action is Action.SKIP:
        return None
    committed = record if isinstance(record, CommitRecord) else None
    files = committed.files if committed is not None else ()
    if action is Action.REFUSE:
        rows = f"rows {committed.start} to {committed.stop}" if committed is not None else "unknown rows"
        raise IdentityError(
            f"{store.url(name)} was committed by another request ({rows}, another identity or cut into blocks "
            "otherwise), though the manifest does not say so. Choose another output folder, or --restart to begin anew"
        )
    warning = None
    if action is Action.QUARANTINE:
        altered = [file.name for file in files if file_state(store, file) is FileState.ALTERED]
        missing = [file.name for file in files if not store.exists(file.name)]
        kept = [store.quarantine(n) for n in [name, *altered] if store.exists(n)]
        damaged = f"damaged or missing: {', '.join(altered + missing)}"
        what = record.reason if isinstance(record, DamagedRecord) else damaged
        warning = f"{store.url(name)}: {what}; kept {', '.join(kept)} for inspection, the block is computed again"
    else:
        store.remove(name)
    for output in sorted({*(file.name for file in files), *outputs}):
        store.remove(output)
    return warning
