"""The resume decision in full, and the state of the folder after each decision."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_score.errors import IdentityError
from dpo_score.storage.base import FileRecord
from dpo_score.storage.commits import CommitRecord, DamagedRecord, StoredRecord, commit, read_records, record_name
from dpo_score.storage.local import LocalStore
from dpo_score.storage.resume import Action, BlockRange, FileState, file_states, next_action, settle
from tests.storage import shim

IDENTITY, OTHER = "1" * 64, "2" * 64
EXPECTED = BlockRange(block=3, blocks=12, start=192, stop=256)
RECORD = CommitRecord("scores/p", 3, 12, 192, 256, IDENTITY, (), {}, "")
SOUND, MISSING, ALTERED = FileState.SOUND, FileState.MISSING, FileState.ALTERED

RECORDS: dict[str, StoredRecord | None] = {
    "none": None,
    "damaged": DamagedRecord("x", "altered"),
    "whole": RECORD,
    "shorter": replace(RECORD, stop=200),
    "longer": replace(RECORD, stop=300),
    "another start": replace(RECORD, start=128),
    "another block": replace(RECORD, block=4),
    "another count": replace(RECORD, blocks=13),
}
SHARED = ("whole", "longer")
FILES = [states for n in range(3) for states in itertools.product((SOUND, MISSING, ALTERED), repeat=n)]


def expected_action(record: str, identity: str, files: tuple[FileState, ...]) -> Action:
    """The table of the module, said a second time by cases instead of by order."""
    if record == "none":
        return Action.REDO
    if record == "damaged":
        return Action.QUARANTINE
    if identity == OTHER or record.startswith("another"):
        return Action.REFUSE
    if record == "shorter":
        return Action.REDO
    assert record in SHARED
    return Action.QUARANTINE if MISSING in files or ALTERED in files else Action.SKIP


@pytest.mark.parametrize("identity", [IDENTITY, OTHER], ids=["same identity", "other identity"])
@pytest.mark.parametrize("record", RECORDS)
def test_every_row_of_the_table(record: str, identity: str) -> None:
    for files in FILES:
        found = next_action(identity, EXPECTED, RECORDS[record], files)
        assert found is expected_action(record, identity, files), (record, identity, files)


# effects

TABLE = pa.table({"x": [1, 2, 3]})
PART, REJECTS = "scores/p/part-00003-of-00012.parquet", "rejects/p/part-00003-of-00012.parquet"
NAME = record_name("scores/p", 3, 12)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "out")


def committed(store: LocalStore, stop: int = 256, identity: str = IDENTITY) -> CommitRecord:
    files = tuple(store.write_table(name, TABLE, {}) for name in (PART, REJECTS))
    record = replace(RECORD, files=files, stop=stop, identity=identity)
    commit(store, record)
    return record


def resume(store: LocalStore) -> tuple[Action, str | None]:
    record = read_records(store, "scores/p").get(NAME)
    action = next_action(IDENTITY, EXPECTED, record, file_states(store, record))
    return action, settle(store, NAME, action, record, [PART, REJECTS])


def test_a_sound_block_is_left_alone(store: LocalStore) -> None:
    committed(store)
    before = {name: store.read_bytes(name) for name in store.list()}
    assert resume(store) == (Action.SKIP, None)
    assert {name: store.read_bytes(name) for name in store.list()} == before


def test_files_without_a_record_are_deleted(store: LocalStore) -> None:
    store.write_table(PART, TABLE, {})
    assert resume(store) == (Action.REDO, None)
    assert store.list() == ()


def test_a_block_of_a_shorter_limit_is_redone(store: LocalStore) -> None:
    committed(store, stop=200)
    assert resume(store) == (Action.REDO, None)
    assert store.list() == ()


def test_a_record_of_another_identity_is_refused_and_kept(store: LocalStore) -> None:
    committed(store, identity=OTHER)
    with pytest.raises(IdentityError, match=r"00003-of-00012.*\(rows 192 to 256, another identity.*--restart"):
        resume(store)
    assert set(store.list()) == {NAME, PART, REJECTS}


@pytest.mark.parametrize("victim", [PART, REJECTS, NAME])
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "delete"])
def test_damage_is_set_aside_and_the_block_is_free_again(store: LocalStore, victim: str, harm: str) -> None:
    committed(store)
    path = store.path(victim)
    if harm == "flip":
        shim.flip(path, 8 * (path.stat().st_size // 2))
    elif harm == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -20 if harm == "cut" else 0])
    action, warning = resume(store)
    assert store.list() == ()
    if (victim, harm) == (NAME, "delete"):
        assert (action, warning) == (Action.REDO, None)
        return
    assert action is Action.QUARANTINE
    assert warning is not None
    assert victim.rsplit("/", 1)[-1] in warning
    assert ("damaged or missing" in warning) == (victim != NAME)  # of a record, what is wrong with it
    assert bool([n for n in store.list(".work/quarantine") if victim.replace("/", "~") in n]) == (harm != "delete")
    assert resume(store) == (Action.REDO, None)


def test_what_is_altered_and_what_is_missing_are_both_named_and_what_is_kept(store: LocalStore) -> None:
    committed(store)
    store.path(REJECTS).unlink()
    shim.flip(store.path(PART), 400)
    action, warning = resume(store)
    assert action is Action.QUARANTINE
    assert warning is not None
    assert f"damaged or missing: {PART}, {REJECTS}; kept " in warning
    kept = warning.split("; kept ")[1].removesuffix(" for inspection, the block is computed again").split(", ")
    assert len(kept) == 2


def test_every_flipped_bit_of_a_data_file_is_found(store: LocalStore) -> None:
    record = committed(store)
    path = store.path(PART)
    for bit in range(0, path.stat().st_size * 8, 11):
        shim.flip(path, bit)
        assert file_states(store, record) == (ALTERED, SOUND)
        shim.flip(path, bit)
    assert file_states(store, record) == (SOUND, SOUND)


def test_a_crash_while_settling_is_settled_the_next_time(tmp_path: Path) -> None:
    for harm, calls in ((b"", 16), (None, 8)):
        for call in range(1, calls):
            store = LocalStore(tmp_path / f"{harm!r}{call}")
            committed(store, stop=200 if harm is None else 256)
            if harm is not None:
                store.path(PART).write_bytes(harm)
            try:
                with shim.cut_at(call):
                    resume(store)
            except shim.PowerCutError:
                assert resume(store)[0] in (Action.REDO, Action.QUARANTINE)
            assert store.list() == ()


def test_a_file_record_names_what_it_was_given() -> None:
    record = FileRecord("a", 1, 2, "ff")
    assert FileRecord.from_json(record.to_json()) == record
