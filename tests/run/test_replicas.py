"""Models larger than a device: two replicas of two ranks each on this machine, over gloo."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest

from dpo_score.errors import ConfigError, IdentityError
from dpo_score.run import engines, local
from dpo_score.run.precompute import precompute
from dpo_score.run.progress import Progress
from dpo_score.run.verify import verify
from tests.run.conftest import preference_rows, write_rows
from tests.run.test_ray import AtRow

pytestmark = pytest.mark.slow
QUIET = Progress(quiet=True)
BLOCKS = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = preference_rows(64 * BLOCKS - 10)
    rows[130]["chosen"] = None
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.parquet", rows)


def ranks() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "dpo_score.logps.follow" in process.cmdline()]


def gone() -> bool:
    """Ranks end with their leader, a moment later."""
    until = time.monotonic() + 10
    while ranks() and time.monotonic() < until:
        time.sleep(0.1)
    return not ranks()


def scores(out: Path) -> pl.DataFrame:
    return pl.read_parquet(sorted((out / "scores/better").glob("*.parquet")))


class Watching(AtRow):
    """Kills a rank at the second block, and keeps how many groups were at work at once."""

    def __init__(self) -> None:
        super().__init__(2, lambda: ranks()[0].kill())
        self.most = 0

    def rows(self, count: int) -> None:
        super().rows(count)
        self.most = max(self.most, len(ranks()))


def test_two_replicas_of_two_ranks_one_of_which_dies(runner: Any, data: Path, tmp_path: Path) -> None:
    """The rows of one process within its noise, whoever dies on the way."""
    progress = Watching()
    engines.run(runner.config(data, tmp_path / "split", tensor_parallel=2, workers=2), progress)
    assert progress.most == 2
    assert [line for line in progress.warnings if "a worker was lost (rank 1" in line], progress.warnings
    verify(str(tmp_path / "split")).raise_damage()
    assert gone()
    local.run(runner.config(data, tmp_path / "whole"), QUIET)
    ours, theirs = scores(tmp_path / "split"), scores(tmp_path / "whole")
    assert ours["row_id"].equals(theirs["row_id"])
    for name in ("ref_chosen_logps", "ref_rejected_logps", "policy_chosen_logps", "policy_rejected_logps"):
        assert (ours[name] - theirs[name]).abs().max() < 1e-3
    assert not ours["policy_chosen_logps"].equals(theirs["policy_chosen_logps"])  # else nothing was dealt out
