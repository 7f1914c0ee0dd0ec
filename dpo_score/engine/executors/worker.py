"""One worker of a cluster: holds a model, takes runs of blocks, commits each itself, reports a digest of the record.

What a worker commits is what a run in one process would have committed: it reads numerics, block size and cache files
from the manifest, and refuses work whose identity it does not find again in the data and models that it sees. It holds
no lock: the process that sends it work does. Nothing here knows Ray.
"""

from __future__ import annotations

import os
import platform
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from dpo_score.config.schema import RunConfig
from dpo_score.engine.context import RunContext, open_context
from dpo_score.engine.plan import PolicyTask, RunPlan, Task
from dpo_score.engine.prepare import checked_environment, prepare, resolve_plan
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import BlockSteps, block_steps, compute_blocks
from dpo_score.errors import IdentityError, ModelError
from dpo_score.models.numerics import Numerics
from dpo_score.storage.commits import CommitRecord
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.manifest import read_manifest
from dpo_score.storage.open import open_store
from dpo_score.storage.stage import Stage


@dataclass(frozen=True, slots=True)
class Assignment:
    """A batch of blocks of one task. `numerics`: those of the task, None where it needs no model."""

    stage: Stage
    identity: str
    numerics: Numerics | None
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, task: Task, blocks: tuple[int, ...]) -> Assignment:
        return cls(task.stage, task.identity, task.numerics, blocks)


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker can be given work; where it is."""

    host: str
    process: int


@dataclass(frozen=True, slots=True)
class Report:
    """What returns for a block: its rows, the tokens since the last report, the digest of its record.

    tokens: unique tokens of the rows that passed; cached: those of them whose values the cache had.
    block: None for a report that only carries messages.
    """

    block: int | None = None
    rows: int = 0
    tokens: int = 0
    cached: int = 0
    record: str = ""
    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class RelayedProgress(Progress):
    """Progress that is shown by another process: everything is kept until the next report."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self._lines: list[str] = []
        self._new_warnings: list[str] = []
        self._passed = self._cached = 0

    def say(self, line: str) -> None:
        self._lines.append(line)

    def warn(self, line: str, example: str = "") -> None:
        if line not in self.warnings:
            self.warnings.append(line)
            self._new_warnings.append(line)

    @contextmanager
    def stage(self, label: str, rows: int, done: int = 0) -> Iterator[None]:
        yield

    def count(self, tokens: int, cached: int = 0) -> None:
        self._passed += tokens
        self._cached += cached

    def report(self, record: CommitRecord | None = None) -> Report:
        """Everything since the last report."""
        report = Report(
            tokens=self._passed, cached=self._cached, lines=tuple(self._lines), warnings=tuple(self._new_warnings)
        )
        self._lines, self._new_warnings, self._passed, self._cached = [], [], 0, 0
        if record is None:
            return report
        rows = record.stop - record.start
        return replace(report, block=record.block, rows=rows, record=digest(record.to_json()))


class Worker:
    """Lives as long as its process. The plan is made at the first work, and the model stays loaded between runs of
    blocks of one task.

    Args:
        folder: where relative paths of the configuration begin.
    """

    def __init__(self, config: RunConfig, folder: str) -> None:
        if os.path.isdir(folder):  # noqa: PTH112 - the folder of another machine may be no path here
            os.chdir(folder)
        self._config, self._progress = config, RelayedProgress()
        self._current: tuple[Task, BlockSteps] | None = None

    def ready(self) -> WorkerReady:
        """Answers when the worker can be given work."""
        return WorkerReady(platform.node(), os.getpid())

    def decide(self) -> Report:
        """Resolve every `auto` on this device and write the manifest."""
        prepare(self._config, self._context)
        return self._progress.report()

    def work(self, assignment: Assignment) -> Iterator[Report]:
        """A report for each committed block, in order, as soon as it is committed."""
        reports: queue.Queue[Report | None] = queue.Queue()

        def committed(record: CommitRecord) -> None:
            reports.put(self._progress.report(record))

        def compute() -> None:
            task, steps = self._task_of(assignment)
            compute_blocks(self._context, self._plan, task, steps, assignment.blocks, committed)

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="blocks") as pool:
            done = pool.submit(compute)
            done.add_done_callback(lambda _: reports.put(None))
            while (report := reports.get()) is not None:
                yield report
            yield self._progress.report()
            done.result()

    def _task_of(self, assignment: Assignment) -> tuple[Task, BlockSteps]:
        if self._current is None or self._current[0].identity != assignment.identity:
            self._current = None
            task = self._found(assignment)
            if task.identity != assignment.identity:
                del self._plan  # a reference may have gone to the plain path since: the manifest is read again
                task = self._found(assignment)
            if task.identity != assignment.identity:
                raise IdentityError(
                    f"{platform.node()} finds other data, models or settings for {assignment.stage} than the process "
                    "that sends it work: all machines must see the same files under the same paths"
                )
            self._current = task, block_steps(self._context, self._plan, task)
        return self._current

    def _found(self, assignment: Assignment) -> Task:
        """The task as it is resolved here, on the path that it was assigned with."""
        task = self._plan.task(assignment.stage)
        if isinstance(task, PolicyTask) and task.failure is not None:
            raise ModelError(f"on {platform.node()}: {task.failure.reason}")
        if isinstance(task, PolicyTask) and assignment.numerics is not None and task.numerics != assignment.numerics:
            task = self._plan.with_numerics(task, assignment.numerics).task(assignment.stage)
        return task

    @cached_property
    def _context(self) -> RunContext:
        store = open_store(str(self._config.out), warnings_to=self._progress.warn)
        return open_context(self._config, self._progress, store)

    @cached_property
    def _plan(self) -> RunPlan:
        plan, manifest = resolve_plan(self._config, self._context), read_manifest(self._context.store)
        assert manifest is not None
        checked_environment(self._context, plan)
        return replace(plan, cache_snapshots=manifest.cache_snapshots, keeps_texts=True)
