"""Models larger than a device: groups of two ranks on this machine, over gloo; one in this process, two on Ray."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest

from dpo_score.api import score
from dpo_score.engine.executors import choose as engines
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError, IdentityError, Interrupted
from dpo_score.results.verify.verify import verify
from tests.engine.executors.test_job_array import results
from tests.engine.executors.test_ray import AtRow
from tests.engine.test_run import refuse_loading
from tests.run_fixtures import Runner, preference_rows, write_rows

pytestmark = pytest.mark.slow
QUIET = Progress(quiet=True)
BLOCKS = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = preference_rows(64 * BLOCKS - 10)
    rows[130]["chosen"] = None
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.parquet", rows)


@pytest.fixture(scope="module")
def undisturbed(data: Path, models: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one group leaves that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    Runner(folder / "cache", models)(data, folder / "out", tensor_parallel=2)
    assert gone()
    return results(folder / "out")


def ranks() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if follows(process)]


def follows(process: psutil.Process) -> bool:
    try:
        return "dpo_score.logprobs.rank_worker" in process.cmdline()
    except psutil.NoSuchProcess:  # a process that is gone, or dead and not yet mourned
        return False


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


def test_one_group_stopped_resumed_and_a_rank_killed(
    runner: Any, data: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """In this process, without Ray: the bytes of an undisturbed run, and the rows of a whole model within its noise."""
    split = runner.config(data, tmp_path / "split", tensor_parallel=2)
    with pytest.raises(Interrupted) as stopped:
        engines.run(split, AtRow(2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert stopped.value.exit_code == 130
    assert gone()
    progress = Watching()
    engines.run(split, progress)
    assert progress.most == 1
    assert [line for line in progress.warnings if "its processes are started again" in line], progress.warnings
    verify(str(tmp_path / "split")).raise_damage()
    assert gone()
    assert results(tmp_path / "split") == undisturbed
    runner(data, tmp_path / "whole")
    refuse_differences(scores(tmp_path / "split"), scores(tmp_path / "whole"))


@pytest.mark.skipif(
    os.environ.get("DPO_SCORE_CRASH") != "full", reason="one group, and two workers on Ray, are tested each"
)
@pytest.mark.filterwarnings("ignore")
def test_two_groups_on_ray_and_a_rank_killed(
    runner: Any, data: Path, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of one group in one process."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=os.pathsep)
    progress = Watching()
    shared = runner.config(data, tmp_path / "two", tensor_parallel=2, workers=2, engine="ray")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        engines.run(shared, progress)
    finally:
        ray.shutdown()
    assert progress.most == 2
    assert [line for line in progress.warnings if "a worker was lost" in line], progress.warnings
    verify(str(tmp_path / "two")).raise_damage()
    assert results(tmp_path / "two") == undisturbed


def refuse_differences(ours: pl.DataFrame, theirs: pl.DataFrame) -> None:
    assert ours["row_id"].equals(theirs["row_id"])
    for name in ("ref_chosen_logps", "ref_rejected_logps", "policy_chosen_logps", "policy_rejected_logps"):
        assert (ours[name] - theirs[name]).abs().max() < 1e-3
    assert not ours["policy_chosen_logps"].equals(theirs["policy_chosen_logps"])  # else nothing was dealt out


def test_other_numerics_than_those_of_a_whole_model(
    runner: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither OUT nor the cache of one serves the other."""
    runner(data, tmp_path / "out", limit=64)
    refuse_loading(monkeypatch)
    with pytest.raises(IdentityError, match="tensor_parallel"):
        engines.run(runner.config(data, tmp_path / "out", limit=64, tensor_parallel=2), QUIET)
    runner(data, tmp_path / "again", limit=64)  # the cache serves the same numerics
    with pytest.raises(AssertionError, match="weights were read"):
        runner(data, tmp_path / "parts", limit=64, tensor_parallel=2, path="plain")


def test_what_does_not_divide_is_refused(runner: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 key-value heads"):
        engines.run(runner.config(data, tmp_path / "out", tensor_parallel=4), QUIET)
    assert not (tmp_path / "out/manifest.json").exists()


def test_pairs_in_memory_are_not_dealt_out(models: Any) -> None:
    with pytest.raises(ConfigError, match="use run"):
        score(preference_rows(3), policy=models["better"], reference=models["reference"], tensor_parallel=2)
