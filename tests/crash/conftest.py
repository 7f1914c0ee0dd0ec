"""The job that is killed, failed and interrupted, and how it ends when nobody disturbs it.

`DPO_SCORE_CRASH=full` strikes at every call instead of a spread of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from tests.crash.world import Ended, World

SPREAD = 6
CONSECUTIVE = 28
"""A whole block commit, with what the next block writes beside it."""


@dataclass(frozen=True)
class Golden:
    """An undisturbed run: the calls it made and the hashes of what it left."""

    calls: Sequence[str]
    hashes: dict[str, str]

    @property
    def every(self) -> bool:
        return os.environ.get("DPO_SCORE_CRASH") == "full"

    def points(self, consecutive: int = CONSECUTIVE, spread: int = SPREAD) -> list[int]:
        """Call numbers to strike at: every one, or some in a row (a whole commit) and some spread over the run."""
        total = len(self.calls)
        if self.every:
            return list(range(1, total + 1))
        row = range(total // 2, total // 2 + consecutive)
        return sorted({1, 2, total, *row, *range(1, total, max(total // spread, 1))})


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("crash world"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def golden(world: World) -> Golden:
    world.clean()
    ended = world.run()
    assert ended.status == 0, ended.errors
    return Golden(ended.calls, world.hashes())


def resumed(world: World, golden: Golden) -> Ended:
    """Run the same command again: nothing committed is computed again, and the bytes are those of `golden`."""
    world.check_invariants()
    before = world.identity_of_files()
    ended = world.run()
    assert ended.status == 0, ended.errors
    after = world.identity_of_files()
    assert {name: after[name] for name in before} == before, "a committed block was computed again"
    assert world.hashes() == golden.hashes
    world.check_invariants()
    assert [name for name in world.store.list(".work") if ".tmp-" in name] == []
    return ended
