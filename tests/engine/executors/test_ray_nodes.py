"""Two Ray nodes on this machine, one of them lost in the middle of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dpo_score.engine import run as local
from dpo_score.engine.executors import choose as engines
from dpo_score.engine.executors.ray import RayWorkerHandle
from dpo_score.engine.executors.worker import Report
from dpo_score.engine.progress import Progress
from dpo_score.results.verify.verify import verify
from tests.engine.executors.test_job_array import results
from tests.engine.executors.test_ray import AtRow, on_ray
from tests.run_fixtures import preference_rows, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that computes nothing, and a node with one core; a second is added by the test."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found.add_node(num_cpus=1)
    ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def reporters(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes of the workers that have reported, in that order."""
    found: list[int] = []
    answer = RayWorkerHandle.answer

    def noted(hand: RayWorkerHandle) -> Any:
        said = answer(hand)
        if isinstance(said, Report) and hand._at is not None:
            found.append(hand._at.process)
        return said

    monkeypatch.setattr(RayWorkerHandle, "answer", noted)
    return found


def node_of(cluster: Any, process: int) -> Any:
    """The node whose raylet started it."""
    above = {parent.pid for parent in psutil.Process(process).parents()}
    return next(node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid in above)


@pytest.mark.skipif(os.environ.get("DPO_SCORE_CRASH") != "full", reason="crash/test_kill_ray.py loses the only node")
def test_a_node_lost_in_the_middle(cluster: Any, runner: Any, reporters: list[int], tmp_path: Path) -> None:
    """The one whose worker has just reported: another may not have begun, and would be missed by nobody."""
    data, out, whole = (
        write_rows(tmp_path / "pairs.parquet", preference_rows(500)),
        tmp_path / "out",
        tmp_path / "whole",
    )
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    progress = AtRow(5, lambda: cluster.remove_node(node_of(cluster, reporters[-1]), allow_graceful=False))
    engines.run(on_ray(runner.config(data, out)), progress)
    assert any("a worker was lost" in line for line in progress.warnings)
    verify(str(out)).raise_damage()
    local.run(runner.config(data, whole, cache_dir=str(tmp_path / "other")), Progress(quiet=True))
    assert results(out) == results(whole)
