"""A group of ranks whose members die, fail alone or fall silent: a clear error, and nobody left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from dpo_score.errors import GroupLostError, ModelError
from dpo_score.logps.leader import Leader

pytestmark = pytest.mark.slow
CAUGHT = """
import time
from dpo_score.logps import leader
leader.CAUGHT_SECONDS = 1.0
found = leader.Leader(2, "cpu", {"tensor_parallel": 2, "follows": True})
with found.step("verify", None):
    found._followers[0].process.kill()
    time.sleep(60)  # stands for a collective that never ends
"""


@pytest.fixture
def leader() -> Iterator[Leader]:
    found = Leader(2, "cpu", {"tensor_parallel": 2, "follows": True})
    yield found
    found.close()


def followers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "dpo_score.logps.follow" in process.cmdline()]


def test_a_rank_that_fails_alone_falls_silent_or_dies_is_named(leader: Leader) -> None:
    failed = r"rank 1: KeyError: 'dance'\): the same command resumes"
    with pytest.raises(GroupLostError, match=failed), leader.step("dance"):
        pass
    with pytest.raises(ModelError, match="group of its own already"):
        Leader(2, "cpu", {})
    (follower,) = followers()
    follower.suspend()
    silent = rf"rank 1 \(process {follower.pid}\).* no answer within 0.5 s"
    with pytest.raises(GroupLostError, match=silent), leader.step("dance", seconds=0.5):
        pass
    follower.kill()
    died = rf"rank 1 \(process {follower.pid}\).* died \(exit status -9\)"
    with pytest.raises(GroupLostError, match=died), leader.step("dance"), leader.step("dance"):
        pass
    leader.close()
    assert followers() == []


def test_a_leader_caught_in_a_collective_that_a_dead_rank_left_is_ended() -> None:
    ended = subprocess.run([sys.executable, "-c", CAUGHT], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 70
    assert "a process of a tensor-parallel group died: the same command resumes" in ended.stderr


def test_a_process_that_led_a_group_is_none_of_many_afterwards(leader: Leader) -> None:
    before = dict(os.environ)
    with leader.reading():
        assert os.environ["LOCAL_RANK"] == "0"
    leader.close()
    assert dict(os.environ) == before
    assert not {"LOCAL_RANK", "RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME"} & before.keys()
