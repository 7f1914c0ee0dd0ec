"""Commit records: written whole, read back, and never believed when altered."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_score.errors import DamageError, StorageError, UsageError
from dpo_score.storage.base import FileRecord
from dpo_score.storage.commits import (
    CommitRecord,
    DamagedRecord,
    commit,
    read_record,
    read_records,
    record_name,
    typed,
)
from dpo_score.storage.local import LocalStore
from tests.storage import shim

FILE = FileRecord("scores/p/part-00001-of-00012.parquet", 10, 64, "ab" * 32)
RECORD = CommitRecord(
    stage="scores/p",
    block=1,
    blocks=12,
    start=64,
    stop=128,
    identity="cd" * 32,
    files=(FILE,),
    counts={"scored": 60, "tie": 4},
    row_ids_digest="ef" * 16,
    notes={"packs_split": 1},
    versions={"dpo_score": "0.1.0"},
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def test_names() -> None:
    assert record_name("reference", 0, 12) == "commits/reference/00000-of-00012.json"
    assert RECORD.name == "commits/scores/p/00001-of-00012.json"
    for block, blocks in ((12, 12), (-1, 12), (0, 0)):
        with pytest.raises(UsageError, match="blocks count from 0"):
            record_name("reference", block, blocks)


def test_a_committed_record_is_read_back(store: LocalStore) -> None:
    commit(store, RECORD)
    assert read_records(store, "scores/p") == {RECORD.name: RECORD}


def test_stages_are_kept_apart(store: LocalStore) -> None:
    own_reference = replace(RECORD, stage="reference/p")
    reference = replace(RECORD, stage="reference")
    for record in (RECORD, own_reference, reference):
        commit(store, record)
    assert read_records(store, "reference") == {reference.name: reference}
    assert read_records(store, "reference/p") == {own_reference.name: own_reference}
    assert read_records(store, "scores") == {}
    assert read_records(store, "nothing") == {}


def test_the_same_commit_twice_is_one(store: LocalStore) -> None:
    commit(store, RECORD)
    commit(store, replace(RECORD, notes={}))
    assert read_record(store, RECORD.name) == RECORD


@pytest.mark.parametrize("other", [replace(RECORD, files=(replace(FILE, sha256="00" * 32),)), None])
def test_another_process_that_committed_other_bytes_is_noticed(store: LocalStore, other: CommitRecord | None) -> None:
    if other is None:
        store.write_bytes(RECORD.name, b"{}")
    else:
        commit(store, other)
    with pytest.raises(StorageError, match="committed by another process"):
        commit(store, RECORD)


def test_every_flipped_bit_of_a_record_is_found(store: LocalStore) -> None:
    commit(store, RECORD)
    path = store.path(RECORD.name)
    bits = len(path.read_bytes()) * 8
    for bit in random.Random(0).sample(range(bits), 800):
        shim.flip(path, bit)
        assert isinstance(read_record(store, RECORD.name), DamagedRecord), f"bit {bit}"
        shim.flip(path, bit)
    assert read_record(store, RECORD.name) == RECORD


def test_every_truncation_of_a_record_is_found(store: LocalStore) -> None:
    commit(store, RECORD)
    path = store.path(RECORD.name)
    data = path.read_bytes()
    for length in range(len(data) - 1):
        path.write_bytes(data[:length])
        assert isinstance(read_record(store, RECORD.name), DamagedRecord)


def test_a_record_under_another_name_is_not_believed(store: LocalStore) -> None:
    store.write_json(record_name("scores/p", 2, 12), RECORD.to_json())
    found = read_record(store, record_name("scores/p", 2, 12))
    assert isinstance(found, DamagedRecord)
    assert "speaks of" in found.reason


def test_a_sealed_record_of_other_fields_is_damage_not_a_traceback() -> None:
    from dpo_score.storage.commits import sealed

    for fields in ({}, {"files": []}, {"files": [{}]}, {"files": [], "stage": "x", "unknown": 1}, {"files": 3}):
        with pytest.raises(DamageError, match="not a commit record"):
            CommitRecord.from_json(sealed(fields))
    for data in ([], None, 3, "x", {"stage": 1}):
        with pytest.raises(DamageError, match="has no checksum"):
            CommitRecord.from_json(data)  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "error"), [("1", TypeError), (1.0, TypeError), (True, TypeError), (-1, ValueError)])
def test_a_count_is_a_whole_number_from_0(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="rows is"):
        typed({"rows": value}, "rows", int)
    assert typed({"rows": 0}, "rows", int) == 0
