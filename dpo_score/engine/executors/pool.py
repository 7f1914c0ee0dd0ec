"""The workers of one run, as the process that leads them sees them: who has which blocks, who answers, who was lost.

Every block is given out until one worker has committed it. A worker's error is raised here as its own; signals are
noticed at any time; a lost worker is started again; when the pool is left, its processes are dead. Where the workers
live is a `WorkerBackend`: a Ray cluster (ray.py), or objects of this process in tests.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dpo_score.config.schema import RunConfig
from dpo_score.engine.context import RunContext
from dpo_score.engine.executors.worker import Assignment, Report, WorkerReady
from dpo_score.engine.plan import RunPlan, Task
from dpo_score.errors import GroupLostError, StorageError
from dpo_score.models.numerics import Numerics
from dpo_score.storage.cache.location import cache_folder, cache_url
from dpo_score.storage.commits import CommitRecord, read_record, record_name
from dpo_score.storage.manifest import read_manifest

POLL_SECONDS = 0.5
SLOW_SECONDS = 20.0
LARGEST_BATCH = 32
"""Blocks given out at once: a large row group is read once for them, and what is lost is asked for again soon."""
ATTEMPTS = 3
"""How many workers may die while they compute a block before the run ends."""


class LostError(Exception):
    """A worker is no more: its process died, or the machine it was on."""


class WorkerHandle(Protocol):
    """One worker. It is asked for one thing at a time: to be ready (from the start), to decide, or to work."""

    def decide(self) -> None:
        """Ask it to resolve the numerics; its answer is a report."""

    def work(self, assignment: Assignment) -> None:
        """Ask it to compute a batch of blocks; its answers are reports, then None."""

    def answer(self) -> WorkerReady | Report | None:
        """Its next answer. Raises the worker's own error, or LostError."""

    def restart(self) -> None:
        """Start it anew, dead or alive: its next answer is that it is ready."""

    def kill(self) -> None: ...

    def wait_dead(self) -> None:
        """Return when the killed process is gone, or after a while."""


class WorkerBackend(Protocol):
    """Where workers run. `capacity`: how many more can run now; `needs`, `has`: for the message while one waits."""

    @property
    def capacity(self) -> int: ...
    @property
    def needs(self) -> str: ...
    @property
    def has(self) -> str: ...

    def start_worker(self, config: RunConfig) -> WorkerHandle: ...

    def answering(self, handles: Sequence[WorkerHandle], seconds: float) -> list[WorkerHandle]:
        """Those that have an answer, after at most `seconds`."""


class BlockQueue:
    """Blocks of one task that no worker has yet, in order: given out in batches, long at first and short at the end."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self._batches: deque[list[int]] = deque([list(blocks)] if blocks else [])
        self._losses: Counter[int] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._batches))

    def take(self, workers: int) -> tuple[int, ...]:
        """The next batch for one of `workers`; empty when nothing is left."""
        if not self._batches:
            return ()
        size = max(1, min(LARGEST_BATCH, len(self) // (2 * max(workers, 1))))
        first = self._batches[0]
        taken, rest = first[:size], first[size:]
        if rest:
            self._batches[0] = rest
        else:
            self._batches.popleft()
        return tuple(taken)

    def put_back(self, blocks: Iterable[int]) -> None:
        """Blocks that a worker was given and did not commit, the one it worked on first. StorageError when that happens
        to a block too often."""
        batch = list(blocks)
        if not batch:
            return
        self._losses[batch[0]] += 1
        if self._losses[batch[0]] >= ATTEMPTS:
            raise StorageError(
                f"block {batch[0]} was being computed by {ATTEMPTS} workers when they died (out of memory is the usual "
                "cause: a smaller --batch-tokens in a new output folder needs less). The same command resumes"
            )
        self._batches.appendleft(batch)


@dataclass(eq=False)
class PoolWorker:
    """A worker and what it does. `left`: blocks it was given and has not reported."""

    handle: WorkerHandle
    ready: bool = False
    busy: bool = False
    left: list[int] = field(default_factory=list)


class WorkerPool:
    """The workers of one run. A context manager: they are killed, and seen dead, before the folder is unlocked."""

    def __init__(self, backend: WorkerBackend, config: RunConfig, context: RunContext) -> None:
        self._backend, self._config, self._context = backend, config, context
        self._workers: list[PoolWorker] = []
        self._most = sys.maxsize

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.handle.kill()
        for worker in self._workers:
            worker.handle.wait_dead()

    def decide(self) -> None:
        """One worker resolves the numerics on the device that will compute, and writes the manifest."""
        self._start_first()
        first = self._workers[0]
        first.handle.decide()
        report = self._awaited(first, "numerics are not decided yet")
        assert isinstance(report, Report)
        self._show(report)

    def work(self, plan: RunPlan, task: Task, blocks: Sequence[int]) -> None:
        """Return when all `blocks` are committed. Later there may be capacity for more workers."""
        self._context.reopen_manifest()
        self._start_first()
        queue, rows = BlockQueue(blocks), plan.rows
        with self._context.progress.stage(task.label, rows.mine, rows.mine - rows.count(blocks)):
            while queue or self._busy:
                self._start(min(self._backend.capacity, self._most, len(queue) + self._busy))
                self._give_out(queue, task)
                for worker in self._answering():
                    self._take_answer(worker, queue, plan, task)

    @property
    def _busy(self) -> int:
        return sum(worker.busy for worker in self._workers)

    def _start(self, count: int) -> None:
        while len(self._workers) < count:
            self._workers.append(PoolWorker(self._backend.start_worker(self._config)))

    def _start_first(self) -> None:
        """Wait until the first worker is ready; a line where that takes long, since a cluster waits in silence."""
        if not self._workers:
            self._start(1)
            self._awaited(self._workers[0], f"no worker is ready yet; each needs {self._backend.needs}")
            self._workers[0].ready = True

    def _awaited(self, worker: PoolWorker, what: str) -> WorkerReady | Report | None:
        """The next answer of one worker; signals are noticed meanwhile."""
        slow = time.monotonic() + SLOW_SECONDS
        while not self._backend.answering([worker.handle], POLL_SECONDS):
            self._context.stop.check()
            if time.monotonic() > slow:
                slow = float("inf")
                self._context.progress.say(f"{what}; there are {self._backend.has}")
        try:
            return worker.handle.answer()
        except LostError as error:
            raise _not_started(error) from None

    def _give_out(self, queue: BlockQueue, task: Task) -> None:
        for worker in self._workers:
            if worker.ready and not worker.busy and queue:
                blocks = queue.take(len(self._workers))
                worker.left, worker.busy = list(blocks), True
                worker.handle.work(Assignment.of(task, blocks))

    def _answering(self) -> list[PoolWorker]:
        """Workers with an answer, after at most POLL_SECONDS. Raises Interrupted."""
        self._context.stop.check()
        owing = {id(worker.handle): worker for worker in self._workers if worker.busy or not worker.ready}
        found = self._backend.answering([worker.handle for worker in owing.values()], POLL_SECONDS)
        return [owing[id(handle)] for handle in found]

    def _take_answer(self, worker: PoolWorker, queue: BlockQueue, plan: RunPlan, task: Task) -> None:
        """One answer of one worker."""
        try:
            answer = worker.handle.answer()
        except LostError as error:
            if worker.busy:
                self._lost(worker, str(error), queue, plan, task)
            else:
                self._give_up(worker, error)
            return
        except GroupLostError as error:
            self._lost(worker, error.reason, queue, plan, task)
            return
        except Exception:
            for other in self._workers:  # the task has failed: whoever works on it starts anew, this worker included
                if other.busy:
                    self._restart(other)
            raise
        if isinstance(answer, WorkerReady):
            worker.ready = True
        elif answer is None:
            worker.busy = False
            queue.put_back(worker.left)
        else:
            self._show(answer)
            if answer.block is not None:
                worker.left.remove(answer.block)
                self._context.progress.rows(plan.rows.count([answer.block]))

    def _give_up(self, worker: PoolWorker, error: LostError) -> None:
        """A worker that never became ready. The others go on, and none is started in its place, which would meet the
        same machine."""
        self._workers.remove(worker)
        worker.handle.kill()
        worker.handle.wait_dead()
        if not any(other.ready for other in self._workers):
            raise _not_started(error) from None
        self._most = len(self._workers)
        self._context.progress.warn(f"{_not_started(error)}. The others go on without it")

    def _lost(self, worker: PoolWorker, reason: str, queue: BlockQueue, plan: RunPlan, task: Task) -> None:
        """A worker died: what it had not committed goes back to the queue, and it is started again."""
        gone = [block for block in worker.left if not self._committed(block, plan, task)]
        why = f" ({reason})" if reason else ""
        self._context.progress.warn(f"a worker was lost{why}: {len(gone)} blocks of {task.stage} go to others")
        self._context.progress.rows(plan.rows.count(set(worker.left) - set(gone)))
        self._restart(worker)
        queue.put_back(gone)

    @staticmethod
    def _restart(worker: PoolWorker) -> None:
        worker.left, worker.busy, worker.ready = [], False, False
        worker.handle.restart()

    def _show(self, report: Report) -> None:
        progress = self._context.progress
        for line in report.lines:
            progress.say(line)
        for line in report.warnings:
            progress.warn(line)
        if report.tokens:
            progress.count(report.tokens, report.cached)

    def _committed(self, block: int, plan: RunPlan, task: Task) -> bool:
        name = record_name(task.stage.name, block, plan.rows.blocks)
        if not self._context.store.exists(name):
            return False
        found = read_record(self._context.store, name)
        return isinstance(found, CommitRecord) and found.identity == task.identity


def shared_config(config: RunConfig, context: RunContext, threads: int) -> RunConfig:
    """What each process would decide by itself, decided here for all: the thread count (`threads` where neither the
    folder nor the user says another) and the cache folder."""
    found, asked = read_manifest(context.store), config.compute.threads
    if asked is None and found is not None and found.numerics.get("run"):
        asked = Numerics.from_json(found.numerics["run"]).threads
    cache = cache_url(config.cache_dir) or str(cache_folder(config.cache_dir).absolute())
    compute = config.compute.model_copy(update={"threads": asked or threads})
    return config.model_copy(update={"compute": compute, "cache_dir": cache})


def _not_started(error: LostError) -> StorageError:
    return StorageError(
        f"a worker does not start ({str(error) or 'no reason given'}). Every machine needs dpo-score with the same "
        "versions installed, and the memory that the model takes"
    )
