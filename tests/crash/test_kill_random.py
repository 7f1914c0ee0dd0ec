"""SIGKILL at random moments of fresh processes, three in a row, then the same command to the end.

12 kills here; `DPO_SCORE_KILLS=200 pytest tests/crash/test_kill_random.py -s` for more. Seeds are printed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest

from tests.crash.conftest import Golden, resumed
from tests.crash.world import ROOT, World

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("DPO_SCORE_KILLS", "12"))
IN_A_ROW = 3
PROGRAM = """
import sys
from tests.crash.forkserver import warm_up
warm_up()
from dpo_score.cli import main
main(sys.argv[1:])
"""


@dataclass
class Fresh:
    """A run in a process of its own. `working`: seconds from its first write to its end, as measured."""

    world: World
    working: float = field(default=0.0)

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", PROGRAM, *self.world.argv()]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def measure(self) -> None:
        process = self.start()
        self._until_it_writes(process)
        began = time.monotonic()
        assert process.wait() == 0
        self.working = time.monotonic() - began

    def killed_after(self, seconds: float) -> bool:
        """Whether the kill came before the end."""
        process = self.start()
        self._until_it_writes(process)
        try:
            return process.wait(seconds) != 0
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait() == -signal.SIGKILL

    def _until_it_writes(self, process: subprocess.Popen[bytes]) -> None:
        owner = self.world.out / ".work" / "lock-owner.json"
        before = owner.stat().st_mtime_ns if owner.exists() else 0
        while process.poll() is None and (not owner.exists() or owner.stat().st_mtime_ns == before):
            time.sleep(0.01)


def test_killed_at_random_moments(world: World, golden: Golden) -> None:
    fresh = Fresh(world)
    world.clean()
    fresh.measure()
    assert world.hashes() == golden.hashes
    killed = 0
    for case in range(-(-KILLS // IN_A_ROW)):
        draw = random.Random(case)
        world.clean()
        for kill in range(IN_A_ROW):
            moment = draw.uniform(0, fresh.working / (kill + 1))  # what is left to do shrinks
            struck = fresh.killed_after(moment)
            print(f"seed {case}: {'killed' if struck else 'done'} {moment:.2f} s after its first write")
            killed += struck
            world.check_invariants()
        resumed(world, golden)
    print(f"{killed} kills, no difference")
    assert killed > 0
