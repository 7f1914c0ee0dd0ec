"""A group of ranks whose members die or fail alone: a clear error, and nobody left behind."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from dpo_score.errors import GroupLostError
from dpo_score.logps.leader import Leader

pytestmark = pytest.mark.slow


@pytest.fixture
def leader() -> Iterator[Leader]:
    found = Leader(2, "cpu", {"tensor_parallel": 2, "follows": True})
    yield found
    found.close()


def followers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if any("dpo_score.logps.follow" in part for part in process.cmdline())]


def test_a_rank_that_dies_is_named_and_one_that_fails_alone_says_why(leader: Leader) -> None:
    with pytest.raises(GroupLostError, match=r"rank 1: KeyError: 'dance'"), leader.step("dance"):
        pass
    (follower,) = followers()
    follower.kill()
    died = rf"rank 1 \(process {follower.pid}\).* died \(exit status -9\)"
    with pytest.raises(GroupLostError, match=died), leader.step("path"):
        pass
    leader.close()
    assert followers() == []
