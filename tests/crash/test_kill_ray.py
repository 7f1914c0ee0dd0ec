"""Six kills of a run on Ray, in one folder; many more with `python -m tests.crash.kill_ray`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.kill_ray import KilledRuns, check

pytestmark = pytest.mark.slow


def test_whatever_is_killed_the_same_command_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    runs = KilledRuns(tmp_path, seed=7)
    for victim in ("head", "run", "node", "head", "node", "worker"):
        check(runs.killed(victim))
    runs.finished()
