"""pipelines/ray_cluster.yaml as a Ray job, submitted to a head on this machine as the file says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from dpo_score.results.status import status
from dpo_score.results.verify.verify import verify

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address that jobs are submitted to."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        port, agent = (free.getsockname()[1] for free in (one, other))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = {"num_cpus": 2, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    # The agent that takes jobs has one port of the whole machine by default: beside another cluster it has none.
    cluster = Cluster(initialize_head=True, head_node_args=arguments | {"dashboard_agent_listen_port": agent})
    yield f"http://127.0.0.1:{port}"
    cluster.shutdown()


def submitted(pipeline: Path) -> list[str]:
    """The job-submission command that the pipeline file gives, as words."""
    line = next(line for line in pipeline.read_text().splitlines() if "ray job submit" in line)
    return line.strip("# ").split()


def test_the_recipes_give_the_same_command() -> None:
    text = " ".join((ROOT / "pipelines/README.md").read_text(encoding="utf-8").split())
    assert f"`{' '.join(submitted(ROOT / 'pipelines/ray_cluster.yaml'))}`" in text


def test_the_pipeline_runs_as_a_job(head: str, models: Mapping[str, Path], tmp_path: Path) -> None:
    """With tiny models: those that the file names are the quickstart's, which test_quickstart.py runs."""
    words = submitted(ROOT / "pipelines/ray_cluster.yaml")
    there = {
        "http://HEAD:8265": head,
        "/shared/out": str(tmp_path / "out"),
        "ray": str(Path(sys.executable).parent / "ray"),
    }
    words = [there.get(word, word) for word in words]
    at = words.index("dpo-score")
    words[at : at + 1] = [sys.executable, "-m", "dpo_score"]
    words += ["--limit", "4", "--cache-dir", str(tmp_path / "cache")]
    words += ["--reference", str(models["reference"]), "--policy", f"better={models['better']}"]
    for _ in range(20):  # on a busy machine the head takes jobs only after a while
        found = subprocess.run(words, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=600)
        if "No available agent" not in found.stderr + found.stdout:
            break
        time.sleep(5)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert status(str(tmp_path / "out"))["state"] == "complete"
    verify(str(tmp_path / "out")).raise_damage()
