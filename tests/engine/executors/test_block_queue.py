"""Blocks are handed out in order, each once, and again only when they were lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_score.engine.executors.pool import ATTEMPTS, LARGEST_BATCH, BlockQueue
from dpo_score.errors import StorageError


@given(st.integers(0, 500), st.integers(1, 20))
def test_every_block_once_in_contiguous_runs(count: int, workers: int) -> None:
    backlog, taken = BlockQueue(range(7, 7 + count)), []
    while run := backlog.take(workers):
        assert list(run) == list(range(run[0], run[0] + len(run)))
        assert len(run) <= LARGEST_BATCH
        taken += run
    assert taken == list(range(7, 7 + count))
    assert not backlog


def test_the_last_runs_are_short() -> None:
    backlog = BlockQueue(range(100))
    sizes = []
    while run := backlog.take(4):
        sizes.append(len(run))
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (12, 1)


def test_what_was_lost_comes_first() -> None:
    backlog = BlockQueue(range(10))
    assert backlog.take(1) == (0, 1, 2, 3, 4)
    backlog.put_back([3, 4])
    assert backlog.take(1)[0] == 3


def test_a_block_that_kills_its_workers_ends_the_run() -> None:
    backlog = BlockQueue([5])
    for _ in range(ATTEMPTS - 1):
        backlog.put_back(backlog.take(1))
    with pytest.raises(StorageError, match="block 5 was being computed by 3 workers when they died"):
        backlog.put_back(backlog.take(1))
