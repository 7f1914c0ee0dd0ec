"""Thresholds of glibc are raised inside the block and lowered afterwards.

What kept host memory saves is in tests/benchmarks/README.md: how many pages a heap faults in depends on all that was
ever allocated in it, so no test counts them.
"""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from dpo_score import heap
from dpo_score.heap import KEEP, USUAL


class Heard:
    """Stands for glibc and notes what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[int, int]] = []

    def mallopt(self, name: int, value: int) -> int:
        self.said.append((name, value))
        return 1


def test_thresholds_are_raised_inside_and_lowered_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    monkeypatch.setattr(heap, "glibc", lambda: heard)

    def fail_inside() -> None:
        with heap.host_memory_kept():
            assert heard.said == list(KEEP.items())
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail_inside()
    assert heard.said == [*KEEP.items(), *USUAL.items()]
    assert all(KEEP[name] > USUAL[name] for name in KEEP)


@pytest.mark.skipif(heap.glibc() is None, reason="not glibc: nothing to keep")
@pytest.mark.parametrize("thresholds", [KEEP, USUAL], ids=["keep", "usual"])
def test_glibc_takes_these_values(thresholds: dict[int, int]) -> None:
    libc = heap.glibc()
    try:
        assert all(libc.mallopt(name, value) == 1 for name, value in thresholds.items())
    finally:
        heap._set(libc, USUAL)


def test_where_there_is_no_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "glibc", lambda: None)
    with heap.host_memory_kept() as nothing:
        assert nothing is None


def test_the_command_looks_for_dead_cycles_rarely_and_the_package_leaves_the_caller_alone() -> None:
    look = "import gc, sys; before = gc.get_threshold(); import dpo_score; assert gc.get_threshold() == before; "
    look += "from dpo_score.cli.main import main\ntry: main(['--version'])\nexcept SystemExit: pass\n"
    look += "assert gc.get_threshold()[0] == 50_000; assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", look], check=True, capture_output=True)
    assert gc.isenabled()
