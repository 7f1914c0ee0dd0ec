"""Commit records: the file that says a block is done. The record, not the data file, means done.

    commits/reference/00000-of-00012.json     commits/scores/<policy>/00000-of-00012.json

A record carries a checksum of itself, so an altered one is recognised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from dpo_score.errors import DamageError, StorageError, UsageError
from dpo_score.storage.base import FileRecord, Store
from dpo_score.storage.fingerprint import digest

COMMITS = "commits"
CHECKSUM = "checksum"
_NAME = re.compile(rf"{COMMITS}/(?P<stage>.+)/(?P<block>\d{{5,}})-of-(?P<blocks>\d{{5,}})\.json")


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """One committed block: rows [start, stop) of the whole data, block `block` of `blocks`.

    `stage` is "reference" or "scores/<policy>"; `identity` its digest; `counts` rows by outcome; `notes` what a
    reader must know of how it was computed (packs split or redone); `versions` code and libraries.
    """

    stage: str
    block: int
    blocks: int
    start: int
    stop: int
    identity: str
    files: tuple[FileRecord, ...]
    counts: Mapping[str, int]
    row_ids_digest: str
    notes: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return record_name(self.stage, self.block, self.blocks)

    def to_json(self) -> dict[str, Any]:
        return sealed(asdict(self) | {"files": [file.to_json() for file in self.files]})

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], name: str = "commit record") -> CommitRecord:
        """DamageError naming `name` when the checksum or a field does not hold."""
        known = dict(unsealed(fields, name))
        try:
            files = tuple(FileRecord.from_json(file) for file in known.pop("files"))
            for field_name, kind in _KINDS.items():
                typed(known, field_name, kind)
            for code in known["counts"]:
                typed(known["counts"], code, int)
            if known["block"] >= known["blocks"]:
                raise ValueError(f"block is {known['block']} of {known['blocks']}")
            return cls(files=files, **known)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamageError(f"{name}: not a commit record of this version ({error})") from error


_KINDS: Mapping[str, type] = {
    **dict.fromkeys(("stage", "identity", "row_ids_digest"), str),
    **dict.fromkeys(("block", "blocks", "start", "stop"), int),
    **dict.fromkeys(("counts", "notes", "versions"), dict),
}


def typed(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    """`fields[name]`, a whole number from 0 or of another `kind`. KeyError, TypeError or ValueError when it is none."""
    value = fields[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r:.60}, not of type {kind.__name__}")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{name} is {value}, below 0")
    return value


@dataclass(frozen=True, slots=True)
class DamagedRecord:
    """A record that is there but does not hold."""

    name: str
    reason: str


StoredRecord: TypeAlias = CommitRecord | DamagedRecord


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with the checksum over them."""
    return {**fields, CHECKSUM: digest(fields)}


def unsealed(fields: Any, name: str) -> Mapping[str, Any]:
    """What `sealed` was given, or a DamageError naming `name`."""
    if not isinstance(fields, dict) or CHECKSUM not in fields:
        raise DamageError(f"{name}: has no checksum")
    rest = {key: value for key, value in fields.items() if key != CHECKSUM}
    if digest(rest) != fields[CHECKSUM]:
        raise DamageError(f"{name}: its checksum does not match: the file was altered")
    return rest


def record_name(stage: str, block: int, blocks: int) -> str:
    """commits/<stage>/<block>-of-<blocks>.json"""
    return f"{COMMITS}/{stage}/{part_name(block, blocks)}.json"


def part_name(block: int, blocks: int) -> str:
    """`00000-of-00012`. UsageError unless 0 <= block < blocks."""
    if not 0 <= block < blocks:
        raise UsageError(f"block {block} of {blocks}: blocks count from 0 to {blocks - 1}")
    return f"{block:05d}-of-{blocks:05d}"


def commit(store: Store, record: CommitRecord) -> None:
    """Durable once it returns; call it after every file of the record is.

    StorageError when another process has committed the block meanwhile with other bytes; equal ones are the same.
    """
    if store.write_json(record.name, record.to_json(), if_absent=True):
        return
    found = read_record(store, record.name)
    if isinstance(found, DamagedRecord) or (found.identity, found.files) != (record.identity, record.files):
        raise StorageError(
            f"{store.url(record.name)} was committed by another process while this one computed the block; stop one "
            "of them, then run the same command again"
        )


def read_record(store: Store, name: str) -> StoredRecord:
    """The record at `name`; DamagedRecord when it does not hold or is of another block than its name."""
    try:
        record = CommitRecord.from_json(store.read_json(name), store.url(name))
    except DamageError as error:
        return DamagedRecord(name, str(error))
    if record.name != name:
        return DamagedRecord(name, f"{store.url(name)}: speaks of {record.name}")
    return record


class StoredRecords(Mapping[str, StoredRecord]):
    """The records of one stage by their names, in order; each is read when it is asked for, and not kept.

    So a look at a million blocks holds a million names and one record.
    """

    def __init__(self, store: Store, names: Iterable[str]) -> None:
        self._store, self._names = store, dict.fromkeys(names)

    def __getitem__(self, name: str) -> StoredRecord:
        if name not in self._names:
            raise KeyError(name)
        return read_record(self._store, name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_records(store: Store, stage: str) -> StoredRecords:
    """All records of one stage, by their names (`record_name`); those of other block counts too."""
    found = (name for name in store.list(f"{COMMITS}/{stage}") if _NAME.fullmatch(name))
    return StoredRecords(store, (name for name in found if record_stage(name) == stage))


def discard_stage(store: Store, stage: str, outputs: Iterable[str]) -> None:
    """Delete every block of a stage: its records first, so that none ever names a file that is gone."""
    for folder in (f"{COMMITS}/{stage}", *outputs):
        for name in list(store.list(folder)):
            store.remove(name)


def record_stage(name: str) -> str | None:
    """The stage a record's name belongs to, None when it is no record's name."""
    match = _NAME.fullmatch(name)
    return match["stage"] if match else None
