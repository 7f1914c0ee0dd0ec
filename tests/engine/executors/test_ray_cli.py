"""The command on a running cluster, joined by its address: what is said, Ctrl-C, exit codes, the same command again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from dpo_score.results.verify.verify import verify
from tests.engine.executors.test_job_array import results
from tests.run_fixtures import Runner, preference_rows, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a cluster with two cores."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


class Command:
    """`dpo-score run` on the cluster, in a session of its own, as a terminal would start it."""

    def __init__(self, address: str, data: Path, folder: Path, models: Mapping[str, Path]) -> None:
        self.out = folder / "out"
        words = ["--data", data, "--reference", models["reference"], "--policy", f"better={models['better']}"]
        words += ["--out", self.out, "--cache-dir", folder / "cache", "--threads", "1"]
        words += ["--engine", "ray", "--ray-address", address, "--workers", "2"]
        self.words = [sys.executable, "-m", "dpo_score", "run", *map(str, words)]

    def start(self, *more: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*self.words, *more], cwd=ROOT, stderr=pipe, stdout=pipe, text=True, process_group=0)

    def run(self, *more: str) -> tuple[int, str]:
        """The exit code, and what was said on standard error."""
        process = self.start(*more)
        _, said = process.communicate(timeout=300)
        return process.returncode, said

    def interrupted(self) -> tuple[int, str]:
        """As `run`, with Ctrl-C when the first block is committed: every process of the group hears it."""
        process = self.start()
        while process.poll() is None and not list(self.out.glob("commits/reference/*.json")):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=300)
        return process.returncode, said


def test_ctrl_c_and_the_same_command_again(
    address: str, runner: Runner, models: Mapping[str, Path], tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(64 * 4))
    command = Command(address, data, tmp_path, models)
    code, said = command.interrupted()
    assert (code, "the same command resumes" in said) == (130, True), said
    assert "Traceback" not in said
    done = {path.name: path.stat().st_mtime_ns for path in command.out.glob("commits/reference/*.json")}
    assert done
    code, said = command.run()
    assert code == 0, said
    assert "reference: 256 rows" in said
    assert "better: 256 rows" in said
    again = {path.name: path.stat().st_mtime_ns for path in command.out.glob("commits/reference/*.json")}
    assert {name: again[name] for name in done} == done
    verify(str(command.out)).raise_damage()
    runner(data, tmp_path / "whole", cache_dir=str(tmp_path / "other"))
    assert results(command.out) == results(tmp_path / "whole")
    code, said = command.run("--beta", "0.7")
    assert (code, "loss" in said) == (2, True), said
