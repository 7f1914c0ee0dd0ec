"""The same run on a Ray cluster: the bytes of a local one, whoever dies on the way."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dpo_score.config.schema import RunConfig
from dpo_score.engine import run as local
from dpo_score.engine.executors import choose as engines
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError, DpoScoreError, Interrupted
from dpo_score.export.precompute import precompute
from dpo_score.results.verify.verify import verify
from tests.engine.executors.test_job_array import results
from tests.run_fixtures import Runner, preference_rows, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
QUIET = Progress(quiet=True)
BLOCKS = 6


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of two one-core workers on this machine, as long as this file's tests."""
    module = pytest.importorskip("ray")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    module.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield module
    module.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = preference_rows(64 * BLOCKS - 10)
    rows[130]["chosen"] = None
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.parquet", rows)


@pytest.fixture(scope="module")
def whole(data: Path, models: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("whole")
    local.run(Runner(folder / "cache", models).config(data, folder / "out"), Progress(quiet=True))
    return results(folder / "out")


class AtRow(Progress):
    """Does something, once, when so many blocks have been reported."""

    def __init__(self, block: int, act: Callable[[], None]) -> None:
        super().__init__(quiet=True)
        self._left, self._act = block, act

    def rows(self, count: int) -> None:
        super().rows(count)
        self._left -= 1
        if self._left == 0:
            self._act()


def on_ray(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"compute": config.compute.model_copy(update={"engine": "ray"})})


def workers() -> list[psutil.Process]:
    below = psutil.Process().children(recursive=True)
    return [process for process in below if any("ray::Worker" in part for part in process.cmdline()[:1])]


def kill_one() -> None:
    workers()[0].kill()


def test_two_workers_leave_what_one_process_leaves(
    ray: Any, runner: Any, data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    engines.run(on_ray(runner.config(data, out)), QUIET)
    assert results(out) == whole
    verify(str(out)).raise_damage()
    assert workers() == []


def test_a_data_set_precomputed_by_workers(ray: Any, runner: Any, data: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("here", "there"):
        config = runner.config(data, tmp_path / name, cache_dir=str(tmp_path / f"{name}-cache"), policy=None)
        precompute(on_ray(config) if name == "there" else config, QUIET)
        paths = [path for top in ("data", "reference") for path in (tmp_path / name / top).rglob("*.parquet")]
        found[name] = {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths}
    assert found["there"] == found["here"] != {}


@pytest.mark.skipif(os.environ.get("DPO_SCORE_CRASH") != "full", reason="crash/test_kill_ray.py kills workers")
def test_a_worker_killed_in_the_middle_costs_nothing_but_its_block(
    ray: Any, runner: Any, data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out, progress = tmp_path / "out", AtRow(2, kill_one)
    engines.run(on_ray(runner.config(data, out)), progress)
    assert any("a worker was lost" in line for line in progress.warnings)
    assert results(out) == whole
    verify(str(out)).raise_damage()


def test_begun_locally_finished_on_ray(
    ray: Any, runner: Any, data: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out, config = tmp_path / "out", runner.config(data, tmp_path / "out")
    ctrl_c = AtRow(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted) as stopped:
        local.run(config, ctrl_c)
    assert stopped.value.exit_code == 130
    local.run(config.model_copy(update={"limit": 64 * (BLOCKS - 3)}), QUIET)
    engines.run(on_ray(config), QUIET)
    assert results(out) == whole


def test_a_policy_that_fails_in_a_worker_fails_as_it_does_here(
    ray: Any, runner: Any, data: Path, tmp_path: Path, models: Any
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in models["worse"].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    damaged = broken / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-400])
    policies = [f"broken={broken}", f"better={models['better']}"]
    found = engines.run(on_ray(runner.config(data, tmp_path / "out", policy=policies)), QUIET)
    here = runner(data, tmp_path / "here", policy=policies)
    assert found.failures == here.failures
    assert list(found.summary["policies"]) == ["better"]


@pytest.mark.parametrize(
    ("address", "said"), [("127.0.0.1:1", "no Ray cluster at 127"), ("ray://a:1", "ray job submit")]
)
def test_a_cluster_that_is_not_there_is_one_paragraph(
    address: str, said: str, runner: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("ray")
    monkeypatch.setattr(module, "is_initialized", lambda: False)
    config = runner.config(data, tmp_path / "out", engine="ray", ray_address=address)
    with pytest.raises(ConfigError, match=said):
        engines.run(config, QUIET)


class Slow:
    """Ray on a machine so busy that its own processes do not stand in time, the first `failures` times."""

    def __init__(self, failures: int) -> None:
        self.failures, self.starts, self.stops = failures, 0, 0

    def init(self, **_: Any) -> None:
        self.starts += 1
        if self.starts <= self.failures:
            raise Exception("The current node timed out during startup.")

    def shutdown(self) -> None:
        self.stops += 1


def test_a_cluster_that_does_not_stand_in_time_is_begun_again() -> None:
    from dpo_score.engine.executors import ray as engine

    slow = Slow(2)
    engine._join(slow, "local")
    assert (slow.starts, slow.stops) == (3, 2)
    with pytest.raises(DpoScoreError, match=r"timed out during startup.*the same command resumes"):
        engine._join(Slow(3), "local")
    with pytest.raises(DpoScoreError, match="does not start"):
        engine._join(Slow(1), "10.0.0.1:6379")


def test_without_ray_the_message_says_what_to_install(
    runner: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_score.engine.executors import ray as engine

    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'dpo-score\[ray\]'"):
        engines.run(runner.config(data, tmp_path / "out", engine="ray"), QUIET)
