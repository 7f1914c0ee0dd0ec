"""One worker of a cluster: holds a model, takes runs of blocks, commits each itself, reports a digest of the record.

Promises: what a worker commits is what a local run would have: it reads numerics, block size and cache files from the
manifest and refuses work whose identity it does not find again in the data and models that it sees. Knows nothing of
Ray. Holds no lock: whoever sends it work does.
"""

from __future__ import annotations

import os
import platform
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

from dpo_score.config.schema import RunConfig
from dpo_score.engine.context import RunContext, open_context
from dpo_score.engine.plan import PolicyTask, ReferenceTask, RunPlan
from dpo_score.engine.prepare import Preparation, identified, prepare
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import Compute, Stage, stage_work, work
from dpo_score.errors import IdentityError, ModelError
from dpo_score.models.numerics import Numerics
from dpo_score.storage.commits import CommitRecord
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.manifest import read_manifest
from dpo_score.storage.open import open_store


@dataclass(frozen=True, slots=True)
class Assignment:
    """A run of blocks of one stage. `numerics`: those of the stage, None where it needs no model."""

    stage: str
    identity: str
    numerics: Numerics | None
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, task: ReferenceTask | PolicyTask, blocks: tuple[int, ...]) -> Assignment:
        return cls(task.stage, task.identity, task.numerics, blocks)


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker can be given work; where it is."""

    host: str
    process: int


@dataclass(frozen=True, slots=True)
class Report:
    """What returns for a block: its rows, the tokens computed since the last report, the digest of its record.

    `block` None: only something to say.
    """

    block: int | None = None
    rows: int = 0
    tokens: int = 0
    record: str = ""
    said: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()


class RelayedProgress(Progress):
    """A voice that is heard elsewhere: what is said is kept until the next report."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self._told: list[str] = []
        self._warned_of: list[str] = []
        self._computed = 0

    def say(self, line: str) -> None:
        self._told.append(line)

    def warn(self, line: str, example: str = "") -> None:
        if line not in self.warnings:
            self.warnings.append(line)
            self._warned_of.append(line)

    @contextmanager
    def stage(self, label: str, rows: int, done: int = 0) -> Iterator[None]:
        with nullcontext():
            yield

    def rows(self, count: int) -> None:
        """Counted where the reports go."""

    def tokens(self, count: int) -> None:
        self._computed += count

    def report(self, record: CommitRecord | None = None) -> Report:
        """Everything since the last report."""
        said, warned, tokens = tuple(self._told), tuple(self._warned_of), self._computed
        self._told, self._warned_of, self._computed = [], [], 0
        if record is None:
            return Report(None, 0, tokens, "", said, warned)
        return Report(record.block, record.stop - record.start, tokens, digest(record.to_json()), said, warned)


class Worker:
    """Lives as long as its process; the job is resolved at the first work. `folder`: where relative paths begin."""

    def __init__(self, config: RunConfig, folder: str) -> None:
        if os.path.isdir(folder):  # noqa: PTH112 - the folder of another machine may be no path here
            os.chdir(folder)
        self._config, self._relay = config, RelayedProgress()
        self._now: tuple[str, Stage, Compute] | None = None

    def ready(self) -> WorkerReady:
        """Answers when the worker can be given work."""
        return WorkerReady(platform.node(), os.getpid())

    def decide(self) -> Report:
        """Resolve every `auto` on this device and write the manifest."""
        prepare(self._config, self._context)
        return self._relay.report()

    def work(self, assignment: Assignment) -> Iterator[Report]:
        """A report per committed block, in order, as soon as it is committed."""
        reports: queue.Queue[Report | None] = queue.Queue()
        self._context.committed = lambda record: reports.put(self._relay.report(record))
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="blocks") as pool:
            done = pool.submit(self._blocks, assignment)
            done.add_done_callback(lambda _: reports.put(None))
            while (report := reports.get()) is not None:
                yield report
            yield self._relay.report()
            done.result()

    def _blocks(self, assignment: Assignment) -> None:
        stage, compute = self._stage(assignment)
        work(self._context, self._plan, stage, compute, assignment.blocks)

    def _stage(self, assignment: Assignment) -> tuple[Stage, Compute]:
        """The model stays loaded from one run of blocks to the next."""
        if self._now is None or self._now[0] != assignment.identity:
            self._now = None
            self._now = (assignment.identity, *stage_work(self._context, self._plan, self._task(assignment)))
        return self._now[1:]

    def _task(self, assignment: Assignment) -> ReferenceTask | PolicyTask:
        task = self._found(assignment)
        if task.identity != assignment.identity:
            del self._plan  # a reference may have gone to the plain path since: the manifest is read again
            task = self._found(assignment)
        if task.identity != assignment.identity:
            raise IdentityError(
                f"{platform.node()} finds other data, models or settings for {assignment.stage} than the process that "
                "sends it work: all machines must see the same files under the same paths"
            )
        return task

    def _found(self, assignment: Assignment) -> ReferenceTask | PolicyTask:
        """The task as it is resolved here, on the path that it was assigned with."""
        tasks: list[ReferenceTask | PolicyTask] = [*self._plan.references, *self._plan.policies]
        task = next(task for task in tasks if task.stage == assignment.stage)
        if isinstance(task, PolicyTask) and task.failure is not None:
            raise ModelError(f"on {platform.node()}: {task.failure}")
        if isinstance(task, PolicyTask) and task.numerics != assignment.numerics:
            task = identified(replace(task, numerics=assignment.numerics), self._plan.identities)
        return task

    @cached_property
    def _context(self) -> RunContext:
        store = open_store(str(self._config.out), warnings_to=self._relay.warn)
        return open_context(self._config, self._relay, store)

    @cached_property
    def _plan(self) -> RunPlan:
        plan, manifest = Preparation(self._config, self._context).plan(), read_manifest(self._context.store)
        assert manifest is not None
        return replace(plan, cache_snapshots=manifest.cache_snapshots)
