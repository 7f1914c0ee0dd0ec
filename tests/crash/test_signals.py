"""SIGINT and SIGTERM: the first stops cleanly and says how to go on, the second at once."""

from __future__ import annotations

import signal

import pytest

from tests.crash.conftest import Golden, resumed
from tests.crash.world import World

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM"])
def test_the_first_signal_stops_between_blocks(world: World, golden: Golden, kind: str) -> None:
    number = getattr(signal, kind)
    total = len(golden.calls)
    for call in (total // 8, total // 2):
        world.clean()
        ended = world.run(kind=kind, call=call)
        assert ended.status == 128 + number, ended.errors
        assert "same command resumes" in ended.errors
        assert "Traceback" not in ended.errors
        assert [name for name in world.store.list(".work") if ".tmp-" in name] == []
        resumed(world, golden)


def test_the_second_signal_ends_the_process_at_once(world: World, golden: Golden) -> None:
    world.clean()
    ended = world.run(kind="SIGINT", call=len(golden.calls) // 3, times=2)
    assert ended.status == -signal.SIGINT
    resumed(world, golden)
