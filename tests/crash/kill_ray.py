"""`kill -9` of the processes of a run on Ray at random moments: each time the same command goes on, and in the end the
bytes are those of a run that nobody disturbed.

    python -m tests.crash.kill_ray [--kills 50] [--seed 0]      prints what was killed, when, and what was said

Killed in turn: the run itself, a worker, the node (whose raylet is the object store, too), the head process (GCS).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.engine.executors.test_job_array import results
from tests.run_fixtures import preference_rows, write_rows
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
VICTIMS = ("run", "worker", "node", "head")
BLOCKS = 24
RESUMES = "the same command resumes"


@dataclass(frozen=True, slots=True)
class Killed:
    """`committed`: blocks at that moment; `said`: standard error of the run; `left`: Ray's processes 5 s later."""

    victim: str
    committed: int
    status: int
    said: str
    left: list[str]


class KilledRuns:
    """One output folder, worked on by one run after the other."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.out, self._random = folder, folder / "out", random.Random(seed)
        for number, name in enumerate(("reference", "better")):
            save_tiny(folder / name, seed=number)
        write_rows(folder / "pairs.parquet", preference_rows(64 * BLOCKS))

    def command(self, out: Path, *more: str) -> list[str]:
        words = ["--data", self.folder / "pairs.parquet", "--reference", self.folder / "reference", "--out", out]
        words += ["--policy", f"better={self.folder / 'better'}", "--cache-dir", f"{out}-cache", "--threads", "1"]
        return [sys.executable, "-m", "dpo_score", "run", *map(str, words), *more]

    def on_ray(self) -> subprocess.Popen[str]:
        command = self.command(self.out, "--engine", "ray", "--workers", "1")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)

    def committed(self) -> int:
        return len(list(self.out.glob("commits/**/*.json")))

    def killed(self, victim: str) -> Killed:
        """A run that loses `victim` at a random moment after it has committed a block of its own."""
        process, before = self.on_ray(), self.committed()
        while process.poll() is None and self.committed() == before and before < 2 * BLOCKS:
            time.sleep(0.02)
        time.sleep(self._random.uniform(0.0, 0.5))
        committed = self.committed()
        below = _below(process.pid)
        for target in _targets(victim, process.pid, below):
            target.kill()
        _, said = process.communicate(timeout=180)
        psutil.wait_procs(below, timeout=5)
        left = [" ".join(each.cmdline()[:1]) for each in below if _is_alive(each)]
        return Killed(victim, committed, process.returncode, said, left)

    def finished(self) -> None:
        process = self.on_ray()
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        whole = self.folder / "whole"
        subprocess.run(self.command(whole, "--quiet"), check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        assert results(self.out) == results(whole)


def _below(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _targets(victim: str, run: int, below: list[psutil.Process]) -> Iterator[psutil.Process]:
    if victim == "run" and psutil.pid_exists(run):
        yield psutil.Process(run)
    wanted = {"worker": "ray::Worker", "node": "raylet/raylet", "head": "gcs_server"}.get(victim)
    for each in below:
        try:
            if wanted is not None and wanted in (each.cmdline() or [""])[0]:
                yield each
        except psutil.NoSuchProcess:
            continue


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check(found: Killed) -> None:
    """What is said, and what is left of Ray. A run that ends before it is hit says nothing."""
    if found.victim == "worker":
        assert found.status == 0, found.said
        return
    assert RESUMES in found.said or found.status == 0, found
    assert "Traceback" not in found.said, found.said
    assert "\x1b[" not in found.said, found.said
    assert found.victim != "run" or found.status in (0, -signal.SIGKILL), found
    assert found.left == [], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    done = 0
    while done < asked.kills:
        with tempfile.TemporaryDirectory(prefix="dpo-score-kills-") as folder:
            runs = KilledRuns(Path(folder), asked.seed + done)
            for victim in VICTIMS[: asked.kills - done]:
                found = runs.killed(victim)
                check(found)
                done += 1
                print(f"{done}: {found.victim} at {found.committed} of {2 * BLOCKS} blocks: exit {found.status}")
            runs.finished()
    print(f"{done} kills: every folder holds the bytes of a run that nobody disturbed")


if __name__ == "__main__":
    main()
