"""Large blocks that are freed and allocated again cost no page faults inside `kept`, and do outside."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_score.logps import host_memory

PROJECT = Path(__file__).parents[2]
glibc = pytest.mark.skipif(host_memory._glibc() is None, reason="not glibc: nothing to keep")


def faults(rounds: int = 10) -> int:
    """Pages faulted in by `rounds` goes of 96 MiB in blocks of 16, after a first go."""

    def go() -> None:
        blocks = [torch.empty(2**24, dtype=torch.uint8).fill_(1) for _ in range(6)]
        del blocks

    go()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        go()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@glibc
def test_freed_blocks_are_kept_inside_and_given_back_outside() -> None:
    """In a fresh process: what a heap gives back depends on all that was ever allocated in it."""
    script = (
        "from dpo_score.logps.host_memory import kept; from tests.logps.test_host_memory import faults\n"
        "with kept(): print(faults())\n"
        "print(faults())"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PROJECT)
    inside, outside = map(int, ended.stdout.split())
    assert inside < 1000 < 10_000 < outside


def test_where_there_is_no_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_glibc", lambda: None)
    with host_memory.kept():
        assert faults(1) >= 0
