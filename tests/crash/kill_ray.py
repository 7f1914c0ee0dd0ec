"""`kill -9` of the processes of a run on Ray at random moments: each time the same command goes on, and in the end the
bytes are those of a run that nobody disturbed.

    python -m tests.crash.kill_ray [--kills 50] [--seed 0]      prints what was killed, when, and what was said

Each run loses a worker, which it survives, and then one of: the run itself, the node (whose raylet is the object store,
too), the head process (GCS). Kills that come after a run's last block are not counted.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from dpo_score.cli.main import main as dpo_score
from tests.engine.executors.test_job_array import results
from tests.run_fixtures import preference_rows, write_rows
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]
PROGRAMS = {"worker": "ray::Worker", "node": "raylet/raylet", "head": "gcs_server"}
LAST = ("run", "node", "head")
"""What ends a run when it is killed."""
BLOCKS = 24
RESUMES = "the same command resumes"


@dataclass(frozen=True, slots=True)
class Killed:
    """`victims`: who was killed, and how many blocks were committed by then; `said`: standard error of the run;
    `left`: Ray's processes 5 s later."""

    victims: tuple[tuple[str, int], ...]
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
        return ["run", *map(str, words), *more]

    def committed(self) -> int:
        return len(list(self.out.glob("commits/**/*.json")))

    def killed(self, last: str) -> Killed:
        """A run that loses a worker, and then `last`, each at a random moment after it has committed a block more."""
        words = [sys.executable, "-m", "dpo_score", *self.command(self.out, "--engine", "ray", "--workers", "1")]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        run = subprocess.Popen(words, stderr=pipe, stdout=null, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        victims = []
        for victim in ("worker", last):
            before = self.committed()
            while run.poll() is None and self.committed() == before < 2 * BLOCKS:
                time.sleep(0.02)
            time.sleep(self._random.uniform(0.0, 0.5))
            committed, below = self.committed(), _below(run.pid)
            for target in _targets(victim, run.pid, below):
                target.kill()
            if committed < 2 * BLOCKS:
                victims.append((victim, committed))
        _, said = run.communicate(timeout=300)
        psutil.wait_procs(below, timeout=5)
        left = [" ".join(each.cmdline()[:1]) for each in below if _is_alive(each)]
        return Killed(tuple(victims), run.returncode, said, left)

    def finished(self) -> None:
        """The rest of it in this process, and the same run undisturbed in a folder of its own: equal bytes."""
        for out in (self.out, self.folder / "whole"):
            with pytest.raises(SystemExit) as ended, redirect_stdout(io.StringIO()):
                dpo_score(self.command(out, "--quiet"))
            assert not ended.value.code
        assert results(self.out) == results(self.folder / "whole")


def _below(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _targets(victim: str, run: int, below: list[psutil.Process]) -> Iterator[psutil.Process]:
    if victim == "run" and psutil.pid_exists(run):
        yield psutil.Process(run)
    for each in below:
        try:
            if victim in PROGRAMS and PROGRAMS[victim] in (each.cmdline() or [""])[0]:
                yield each
        except psutil.NoSuchProcess:
            continue


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check(found: Killed, last: str) -> None:
    """What is said, and what is left of Ray. A run that ended before it was hit says nothing."""
    assert RESUMES in found.said or found.status == 0, found
    assert "Traceback" not in found.said, found.said
    assert "\x1b[" not in found.said, found.said
    assert last != "run" or found.status in (0, -signal.SIGKILL), found
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
            for last in LAST:
                found = runs.killed(last)
                check(found, last)
                for victim, committed in found.victims:
                    done += 1
                    print(f"{done}: {victim} at {committed} of {2 * BLOCKS} blocks", flush=True)
                print(f"    exit {found.status}", flush=True)
            runs.finished()
    print(f"{done} kills: every folder holds the bytes of a run that nobody disturbed")


if __name__ == "__main__":
    main()
