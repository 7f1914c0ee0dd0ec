"""A power cut at every call of a commit, with every unsynced write and folder entry in every state.

Whatever survives, a resumed run either skips a block whose files are sound or computes it again; no record ever
speaks of a file that is not what it says.
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_score.errors import DpoScoreError
from dpo_score.storage.commits import CommitRecord, commit, read_records, record_name
from dpo_score.storage.fingerprint import Identities
from dpo_score.storage.local import LocalStore
from dpo_score.storage.manifest import ManifestRequest, open_manifest, read_manifest
from dpo_score.storage.resume import Action, BlockRange, file_states, next_action, settle
from tests.storage import shim

BLOCKS = 2
IDENTITIES = Identities({"data": "d"}, {"weights": "w"}, {})
REQUEST = ManifestRequest(IDENTITIES, {}, 3, 6, "2026-01-01T00:00:00+00:00", "host", {})


def outputs(block: int) -> list[str]:
    part = f"part-{block:05d}-of-{BLOCKS:05d}.parquet"
    return [f"reference/{part}", f"rejects/reference/{part}"]


def run(store: LocalStore) -> list[Action]:
    """A whole run: the manifest, then each block that is not committed."""
    actions = []
    open_manifest(store, REQUEST)
    for block in range(BLOCKS):
        name = record_name("reference", block, BLOCKS)
        record = read_records(store, "reference").get(name)
        span = BlockRange(block, BLOCKS, 3 * block, 3 * block + 3)
        action = next_action(IDENTITIES.reference_digest, span, record, file_states(store, record))
        settle(store, name, action, record, outputs(block))
        actions.append(action)
        if action is not Action.SKIP:
            _compute(store, block)
    return actions


def _compute(store: LocalStore, block: int) -> None:
    files = tuple(
        store.write_table(name, pa.table({"row": [3 * block + i for i in range(3)]}), {}) for name in outputs(block)
    )
    span = (3 * block, 3 * block + 3)
    commit(store, CommitRecord("reference", block, BLOCKS, *span, IDENTITIES.reference_digest, files, {}, ""))


def contents(store: LocalStore) -> dict[str, bytes]:
    return {name: store.read_bytes(name) for name in store.list()}


State = dict[str, bytes]


def recover(state: State, root: Path, golden: LocalStore) -> None:
    """Resume from one state, and hold the result against an uninterrupted run."""
    shim.lay_out(state, root)
    store = LocalStore(root)
    assert set(run(store)) <= {Action.SKIP, Action.REDO}, sorted(state)
    assert contents(store) == contents(golden), sorted(state)
    assert read_manifest(store) == read_manifest(golden)


def states_after(call: int, root: Path) -> list[State]:
    """What a cut at one call of a run may leave (at most 4096 states)."""
    root.mkdir()
    disk = shim.Disk(root)
    with shim.primitives(disk.wrap), suppress(shim.PowerCutError), shim.cut_at(call):
        run(LocalStore(root))
    return list(itertools.islice(disk.states(), 4096))


def all_states(calls: int, tmp_path: Path) -> list[State]:
    """Distinct states over all calls, latest first."""
    found = (state for call in range(calls + 1, 0, -1) for state in states_after(call, tmp_path / f"run{call}"))
    return list({tuple(sorted(state.items())): state for state in found}.values())


def test_recovery_from_every_state_a_power_cut_may_leave(tmp_path: Path) -> None:
    golden = LocalStore(tmp_path / "golden")
    calls = len(shim.count(lambda: run(golden)))
    states = all_states(calls, tmp_path)
    _recover_all(states, tmp_path, golden)
    print(f"{calls} calls, {len(states)} states")
    assert len(states) >= 9, "each of the eight files durable in turn, and nothing at all"


def _recover_all(states: list[State], tmp_path: Path, golden: LocalStore) -> None:
    for number, state in enumerate(states):
        recover(state, tmp_path / f"state{number}", golden)


@pytest.mark.parametrize("forgotten", ["fsync", "fsync_dir"])
def test_a_store_that_forgets_to_sync_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """The model of the device is severe enough to tell."""
    golden = LocalStore(tmp_path / "golden")
    calls = len(shim.count(lambda: run(golden)))
    monkeypatch.setattr(shim.Disk, f"_{forgotten}", lambda *_: None)
    states = all_states(calls, tmp_path)
    with pytest.raises((AssertionError, DpoScoreError)):
        _recover_all(states, tmp_path, golden)
