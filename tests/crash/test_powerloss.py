"""A power cut at the storage calls of a real run: unsynced writes and folder entries gone; the same command resumes.

The calls that one run made are fed to a model of the device (tests/storage/shim.py), which tells what a cut after each
of them may leave. Each of those file systems is laid out and the run begun again. `DPO_SCORE_CRASH=full` takes them
all instead of a spread.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, TypeAlias

import pytest

from dpo_score.errors import DpoScoreError
from tests.crash.conftest import Golden, resumed
from tests.crash.world import World
from tests.storage import shim
from tests.storage.test_powerloss import State

pytestmark = pytest.mark.slow
SPREAD = 5
STATES = 64
Call: TypeAlias = tuple[str, Sequence[Any], Any]


@pytest.fixture(scope="module")
def calls(world: World, golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    """The calls of an undisturbed run, with what they wrote."""
    record = tmp_path_factory.mktemp("calls") / "calls"
    world.clean()
    ended = world.run(record=record)
    assert ended.status == 0, ended.errors
    with record.open("rb") as file:
        return list(unpickled(file))


def unpickled(file: Any) -> Iterator[Call]:
    while file.peek(1):
        yield pickle.load(file)


def states(world: World, calls: Sequence[Call]) -> list[State]:
    """Distinct file systems that a cut after one of the calls may leave."""
    disk, found = shim.Disk(world.folder.resolve()), {}
    for call in calls:
        disk.note(*call)
        found |= {frozenset(state.items()): state for state in disk.states()}
    return list(found.values())


def lay_out(world: World, state: State) -> None:
    world.clean()
    shim.lay_out(state, world.folder)


def test_the_same_command_after_a_power_cut(world: World, golden: Golden, calls: list[Call]) -> None:
    found = states(world, calls)
    print(f"{len(calls)} calls, {len(found)} states")
    assert len(found) >= len({args[1] for name, args, _ in calls if name == "replace"}), "each file durable in turn"
    for state in found[:: 1 if golden.every else len(found) // SPREAD]:
        lay_out(world, state)
        resumed(world, golden)


@pytest.mark.parametrize("forgotten", ["fsync", "fsync_dir"])
def test_a_run_that_forgets_to_sync_is_caught(
    world: World, calls: list[Call], monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """The model of the device is severe enough to tell: a cut after the last block leaves what no kill would."""
    monkeypatch.setattr(shim.Disk, f"_{forgotten}", lambda *_: None)
    disk = shim.Disk(world.folder.resolve())
    for call in calls[: last_record(calls)]:
        disk.note(*call)
    with pytest.raises((AssertionError, DpoScoreError)):
        check_all(world, disk)


def check_all(world: World, disk: shim.Disk) -> None:
    for state in islice(disk.states(), STATES):
        lay_out(world, state)
        world.check_invariants()


def last_record(calls: Sequence[Call]) -> int:
    """How many calls there are until the last block is committed."""
    renamed = [i for i, (name, args, _) in enumerate(calls) if name == "replace" and "commits/scores" in str(args[1])]
    return renamed[-1] + 1
