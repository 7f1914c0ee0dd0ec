"""A group of ranks whose members die, fail alone or fall silent: a clear error, and nobody left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from dpo_score.data.types import TokenSequence
from dpo_score.errors import GroupLostError, ModelError
from dpo_score.logprobs.packed import PackedPath
from dpo_score.logprobs.scorer import PairScorer
from dpo_score.logprobs.types import Values
from dpo_score.models.loader import ModelLoader
from dpo_score.models.parallel import rank_zero
from dpo_score.models.parallel.rank_zero import RankZero
from tests.logprobs.engine import numerics_for
from tests.logprobs.sequences import awkward
from tests.models.model_folders import source
from tests.tiny import save_tiny, tiny_model

pytestmark = pytest.mark.slow
CAUGHT = """
import time
from dpo_score.models.parallel import rank_zero
rank_zero.CAUGHT_SECONDS = 1.0
found = rank_zero.RankZero(2, "cpu", {"tensor_parallel": 2, "is_worker": True})
with found.step("verify", None):
    found._workers[0].process.kill()
    time.sleep(60)  # stands for a collective that never ends
"""

SCARCE = """
from dpo_score.logprobs import rank_worker as follow
from tests.models.parallel.test_rank_zero import scarce
scarce({most})
follow.main()
"""


def scarce(most: int, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """From now on a pass over more than `most` sequences takes more memory than there is."""
    compute = PackedPath.compute

    def attempt(self: PackedPath, sequences: Sequence[TokenSequence]) -> list[Values]:
        if len(sequences) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(self, sequences)

    patch(PackedPath, "compute", attempt)


@pytest.fixture
def leader() -> Iterator[RankZero]:
    found = RankZero(2, "cpu", {"tensor_parallel": 2, "is_worker": True})
    yield found
    found.close()


def workers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "dpo_score.logprobs.rank_worker" in process.cmdline()]


def test_a_rank_that_fails_alone_falls_silent_or_dies_is_named(leader: RankZero) -> None:
    failed = r"rank 1: KeyError: 'dance'\): the same command resumes"
    with pytest.raises(GroupLostError, match=failed), leader.step("dance"):
        pass
    with pytest.raises(ModelError, match="group of its own already"):
        RankZero(2, "cpu", {})
    (worker,) = workers()
    worker.suspend()
    silent = rf"rank 1 \(process {worker.pid}\).* no answer within 0.5 s"
    with pytest.raises(GroupLostError, match=silent), leader.step("dance", seconds=0.5):
        pass
    worker.kill()
    died = rf"rank 1 \(process {worker.pid}\).* died \(exit status -9\)"
    with pytest.raises(GroupLostError, match=died), leader.step("dance"), leader.step("dance"):
        pass
    named_first = rf"rank 1 \(process {worker.pid}\).* died \(exit status -9\); rank 0: RuntimeError: reset"
    with pytest.raises(GroupLostError, match=named_first):
        leader._others(RuntimeError("reset"), 0.5)  # as a collective fails whose other end is gone
    leader.close()
    assert workers() == []


def test_ranks_leave_their_group_together_and_one_that_does_not_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    left = RankZero(2, "cpu", {"tensor_parallel": 2, "is_worker": True})
    [process] = [worker.process for worker in left._workers]
    left.close()
    assert process.returncode == 0  # of its own accord
    monkeypatch.setattr(rank_zero, "CLOSE_SECONDS", 0.5)
    silent = RankZero(2, "cpu", {"tensor_parallel": 2, "is_worker": True})
    [process] = [worker.process for worker in silent._workers]
    psutil.Process(process.pid).suspend()
    silent.close()
    assert process.returncode == -9


def test_a_leader_caught_in_a_collective_that_a_dead_rank_left_is_ended() -> None:
    ended = subprocess.run([sys.executable, "-c", CAUGHT], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 70
    assert "a process of a tensor-parallel group died: the same command resumes" in ended.stderr


def test_a_process_that_led_a_group_is_none_of_many_afterwards(leader: RankZero) -> None:
    before = dict(os.environ)
    with leader.reading():
        assert os.environ["LOCAL_RANK"] == "0"
    leader.close()
    assert dict(os.environ) == before
    assert not {"LOCAL_RANK", "RANK", "WORLD_SIZE", "GLOO_SOCKET_IFNAME"} & before.keys()


@pytest.mark.parametrize("elsewhere", [1, 999], ids=["on every rank", "on one rank alone"])
def test_ranks_that_run_out_of_memory(elsewhere: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together: smaller packs, the same values. One alone has left the others in a collective: the group is lost."""
    found = source(save_tiny(tmp_path / "llama", "llama"))
    alone, split = numerics_for(tiny_model(), "fast"), ModelLoader(tensor_parallel=2)
    theirs = PairScorer(ModelLoader().load(found, alone).model, alone).score(awkward())
    command = (sys.executable, "-c", SCARCE.format(most=elsewhere))
    monkeypatch.setattr(rank_zero.RankZero.__init__, "__defaults__", (command,))
    monkeypatch.setattr(rank_zero, "DESERTED_SECONDS", 5.0)
    numerics = replace(alone, tensor_parallel=2)
    try:
        scorer = PairScorer(split.load(found, numerics).model, numerics)
        scarce(1, monkeypatch.setattr)
        if elsewhere > 1:
            with pytest.raises(GroupLostError, match="rank 0: OutOfMemoryError"):
                scorer.score(awkward())
            return
        ours = scorer.score(awkward())
    finally:
        split.close()
    assert scorer.packs_split > 0
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.token_logps, b.token_logps, atol=1e-4)
