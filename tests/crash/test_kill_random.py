"""SIGKILL from outside at random moments, three in a row, then the same command to the end.

12 kills here; `DPO_SCORE_KILLS=200 pytest tests/crash/test_kill_random.py -s` for more. Seeds are printed.
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.crash.conftest import Golden, resumed
from tests.crash.world import World

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("DPO_SCORE_KILLS", "12"))
IN_A_ROW = 3


def seconds(world: World) -> float:
    """How long a run takes that nobody disturbs."""
    world.clean()
    began = time.monotonic()
    assert world.run().status == 0
    return time.monotonic() - began


def killed(world: World, moment: float) -> bool:
    """Whether the kill came before the end."""
    ended = world.run(kill_after=moment)
    assert ended.status in (-signal.SIGKILL, 0), ended.errors
    world.check_invariants()
    return ended.status != 0


def test_killed_at_random_moments(world: World, golden: Golden) -> None:
    whole, struck = seconds(world), 0
    assert world.hashes() == golden.hashes
    for case in range(-(-KILLS // IN_A_ROW)):
        draw = random.Random(case)
        world.clean()
        for before in range(IN_A_ROW):
            moment = draw.uniform(0, whole / (before + 1))  # what is left to do shrinks
            found = killed(world, moment)
            print(f"seed {case}: {'killed' if found else 'done'} {moment:.2f} s after its first write")
            struck += found
        resumed(world, golden)
    print(f"{struck} kills, no difference")
    assert struck > 0
