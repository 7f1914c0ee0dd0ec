"""Who has which blocks while workers come, fall behind and die; the workers live in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_score.config.schema import RunConfig
from dpo_score.engine import prepare
from dpo_score.engine import run as local
from dpo_score.engine.executors.pool import ATTEMPTS, LostError, WorkerHandle, WorkerPool
from dpo_score.engine.executors.worker import Assignment, Report, Worker, WorkerReady
from dpo_score.engine.progress import Progress
from dpo_score.errors import StorageError
from tests.engine.executors.test_job_array import results
from tests.run_fixtures import Runner, preference_rows, write_rows

BLOCKS = 6
Fault = Callable[["Here"], bool]


class Here:
    """A worker of this process. `lost` is asked before each answer; when it says yes, the worker is no more.

    `given`: the blocks it was sent last; `blocks`: those it has committed.
    """

    def __init__(self, config: RunConfig, lost: Fault) -> None:
        self._config, self._lost = config, lost
        self.blocks: list[int] = []
        self.alive = True
        self.restart()

    def restart(self) -> None:
        self._worker, self.given = Worker(self._config, ""), ()
        self._owed: Any = iter([self._worker.ready()])

    def decide(self) -> None:
        self._owed = iter([self._worker.decide()])

    def work(self, assignment: Assignment) -> None:
        self._owed, self.given = self._worker.work(assignment), assignment.blocks

    def answer(self) -> WorkerReady | Report | None:
        if self._lost(self):
            raise LostError("made up for this test")
        found: WorkerReady | Report | None = next(self._owed, None)
        if isinstance(found, Report) and found.block is not None:
            self.blocks.append(found.block)
        return found

    def kill(self) -> None:
        self.alive = False

    def wait_dead(self) -> None:
        assert not self.alive


class Machine:
    """A place for workers: room for as many as `room` says when it is asked. `faults`: which worker dies, and when."""

    needs = has = "nothing"

    def __init__(self, rooms: Callable[[], int], faults: Sequence[Fault] = ()) -> None:
        self._rooms, self._faults = rooms, faults
        self.hired: list[Here] = []

    @property
    def capacity(self) -> int:
        return self._rooms()

    def start_worker(self, config: RunConfig) -> WorkerHandle:
        at = len(self.hired)
        self.hired.append(Here(config, self._faults[at] if at < len(self._faults) else never))
        return self.hired[-1]

    def answering(self, hands: Sequence[WorkerHandle], seconds: float) -> list[WorkerHandle]:
        return list(hands)


def never(_worker: Here) -> bool:
    return False


def always(_worker: Here) -> bool:
    return True


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prepare, "block_rows", lambda *_: 8)
    return write_rows(tmp_path / "pairs.parquet", preference_rows(8 * BLOCKS))


def scored(place: Machine, config: RunConfig, progress: Progress) -> None:
    with (
        local.run_context(config, progress, local.checked_out(config)) as context,
        WorkerPool(place, config, context) as pool,
    ):
        pool.decide()
        working = replace(context, workers=pool)
        plan, _ = prepare.prepare(config, working)
        local.end_run(context, plan, local.run_stages(working, plan))


def test_room_that_comes_while_blocks_are_computed_is_used(runner: Runner, data: Path, tmp_path: Path) -> None:
    place = Machine(lambda: 2 if place.hired and place.hired[0].blocks else 1)
    scored(place, runner.config(data, tmp_path / "out", path="plain"), Progress(quiet=True))
    assert [len(worker.blocks) > 0 for worker in place.hired] == [True, True]
    assert not any(worker.alive for worker in place.hired)
    runner(data, tmp_path / "whole", path="plain", cache_dir=str(tmp_path / "other"))
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_a_worker_that_does_not_stand_is_done_without_and_nobody_takes_its_place(
    runner: Runner, data: Path, tmp_path: Path
) -> None:
    place, progress = Machine(lambda: 3, [never, always]), Progress(quiet=True)
    scored(place, runner.config(data, tmp_path / "out", path="plain"), progress)
    (said,) = progress.warnings
    assert "a worker does not start (made up for this test)" in said
    assert said.endswith("The others go on without it")
    assert [worker.blocks == [] for worker in place.hired] == [False, True, False]


def test_no_worker_that_stands_is_an_error(runner: Runner, data: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="a worker does not start"):
        scored(Machine(lambda: 2, [always]), runner.config(data, tmp_path / "out", path="plain"), Progress(quiet=True))


def test_a_block_that_kills_every_worker_ends_the_run(runner: Runner, data: Path, tmp_path: Path) -> None:
    place, progress = Machine(lambda: 1, [lambda worker: 4 in worker.given]), Progress(quiet=True)
    with pytest.raises(StorageError, match=f"block 4 was being computed by {ATTEMPTS} workers when they died"):
        scored(place, runner.config(data, tmp_path / "out", path="plain"), progress)
    assert progress.warnings == ["a worker was lost (made up for this test): 1 blocks of reference go to others"]
    assert place.hired[0].blocks == [0, 1, 2, 3]
