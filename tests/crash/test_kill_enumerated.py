"""SIGKILL before and after storage calls of a real run; the same command then gives the same bytes."""

from __future__ import annotations

import signal

import pytest

from tests.crash.conftest import Golden, resumed
from tests.crash.world import World

pytestmark = pytest.mark.slow


def test_an_undisturbed_second_run_gives_the_same_bytes(world: World, golden: Golden) -> None:
    world.clean()
    assert world.run().status == 0
    assert world.hashes() == golden.hashes
    assert len([name for name in golden.hashes if name.startswith("scores/better/")]) == 4


def test_a_finished_run_computes_nothing_again(world: World, golden: Golden) -> None:
    world.clean()
    world.run()
    resumed(world, golden)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_a_call(world: World, golden: Golden, after: bool) -> None:
    """Of calls in a row every fourth one both ways, so that every other gap between two calls is struck."""
    struck = 0
    for number in golden.points()[:: 1 if golden.every else 4]:
        world.clean()
        ended = world.run(kind="kill", call=number, after=after)
        assert ended.status in (-signal.SIGKILL, 0), (number, ended.errors)
        struck += ended.status != 0
        resumed(world, golden)
    assert struck > 2


def test_killed_three_times_in_a_row(world: World, golden: Golden) -> None:
    world.clean()
    total = len(golden.calls)
    for share in (4, 5, 6):
        assert world.run(kind="kill", call=total // share).status == -signal.SIGKILL
        world.check_invariants()
    resumed(world, golden)
