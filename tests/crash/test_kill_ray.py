"""Six kills of three runs on Ray, in one folder; many more with `python -m tests.crash.kill_ray`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.kill_ray import LAST, KilledRuns, check

pytestmark = pytest.mark.slow


def test_whatever_is_killed_the_same_command_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    runs = KilledRuns(tmp_path, seed=7)
    for last in LAST:
        check(runs.killed(last), last)
    runs.finished()
