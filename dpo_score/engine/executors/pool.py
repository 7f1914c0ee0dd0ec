"""The workers of one run, as the driver sees them: who has which blocks, who answers, who was lost.

Promises: every block is handed out until one worker has committed it; a worker's error is raised here as its own;
signals are heard at any time; when the crew is left its processes are dead; a dead worker is started again. Where the
workers live is a `Place`: a Ray cluster (ray_crew.py), or processes of this machine (process_crew.py).
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
from dpo_score.engine.plan import PolicyTask, ReferenceTask, RunPlan
from dpo_score.errors import GroupLostError, StorageError
from dpo_score.models.numerics import Numerics
from dpo_score.storage.cache.location import cache_folder, cache_url
from dpo_score.storage.commits import CommitRecord, read_record, record_name
from dpo_score.storage.manifest import read_manifest

POLL_SECONDS = 0.5
SLOW_SECONDS = 20.0


class LostError(Exception):
    """A worker is no more: its process died, or the machine it was on."""


class WorkerHandle(Protocol):
    """One worker. Asked for one thing at a time: to stand (from the start), to decide, or to work."""

    def decide(self) -> None:
        """Have it resolve the numerics; its answer is a report."""

    def work(self, assignment: Assignment) -> None:
        """Have it compute a run of blocks; its answers are reports, then None."""

    def answer(self) -> WorkerReady | Report | None:
        """What it has to say. Raises the worker's own error, or LostError."""

    def restart(self) -> None:
        """Dead or alive, it begins anew: its next answer is that it stands."""

    def kill(self) -> None: ...

    def see_dead(self) -> None:
        """Return when the killed process is gone, or after a while."""


class WorkerBackend(Protocol):
    """Where workers live. `room`: how many there is place for now; `needs`, `has`: for the message while one waits."""

    @property
    def room(self) -> int: ...
    @property
    def needs(self) -> str: ...
    @property
    def has(self) -> str: ...

    def start_worker(self, config: RunConfig) -> WorkerHandle: ...

    def answering(self, handles: Sequence[WorkerHandle], seconds: float) -> list[WorkerHandle]:
        """Those that have something to say, after at most `seconds`."""


@dataclass(eq=False)
class PoolWorker:
    """A worker and what it is at. `left`: blocks it was given and has not reported."""

    handle: WorkerHandle
    stands: bool = False
    busy: bool = False
    left: list[int] = field(default_factory=list)


class WorkerPool:
    """The workers of one run."""

    def __init__(self, backend: WorkerBackend, config: RunConfig, context: RunContext) -> None:
        self._backend, self._config, self._context = backend, config, context
        self._members: list[PoolWorker] = []
        self._most = sys.maxsize

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the workers and see them dead before OUT is unlocked."""
        for member in self._members:
            member.handle.kill()
        for member in self._members:
            member.handle.see_dead()

    def decide(self) -> None:
        """One worker resolves the numerics on the device that will compute, and writes the manifest."""
        self._begin()
        first = self._members[0]
        first.handle.decide()
        report = self._awaited(first, "numerics are not decided yet")
        assert isinstance(report, Report)
        self._relay(report)

    def work(self, plan: RunPlan, task: ReferenceTask | PolicyTask, todo: Sequence[int]) -> None:
        """All of `todo` committed, by whoever is free. There may be room for more workers after a while."""
        self._context.reopen()
        self._begin()
        backlog, rows = BlockQueue(todo), plan.rows
        label = task.name if isinstance(task, PolicyTask) else task.label
        with self._context.progress.stage(label, rows.mine, rows.mine - rows.count(todo)):
            while backlog or self._busy:
                self._hire(min(self._backend.room, self._most, len(backlog) + self._busy))
                self._hand_out(backlog, task)
                for member in self._answering():
                    self._answer(member, backlog, plan, task)

    @property
    def _busy(self) -> int:
        return sum(member.busy for member in self._members)

    def _begin(self) -> None:
        """The first worker stands; said where that takes long, since a cluster waits for room in silence."""
        if not self._members:
            self._hire(1)
            self._awaited(self._members[0], f"no worker stands yet; each needs {self._backend.needs}")
            self._members[0].stands = True

    def _awaited(self, member: PoolWorker, what: str) -> WorkerReady | Report | None:
        """The next answer of one worker; signals are heard meanwhile."""
        slow = time.monotonic() + SLOW_SECONDS
        while not self._backend.answering([member.handle], POLL_SECONDS):
            self._context.stop.check()
            if time.monotonic() > slow:
                slow = float("inf")
                self._context.progress.say(f"{what}; there are {self._backend.has}")
        try:
            return member.handle.answer()
        except LostError as error:
            raise _not_started(error) from None

    def _hire(self, count: int) -> None:
        while len(self._members) < count:
            self._members.append(PoolWorker(self._backend.start_worker(self._config)))

    def _hand_out(self, backlog: BlockQueue, task: ReferenceTask | PolicyTask) -> None:
        for member in self._members:
            if member.stands and not member.busy and backlog:
                blocks = backlog.take(len(self._members))
                member.left, member.busy = list(blocks), True
                member.handle.work(Assignment.of(task, blocks))

    def _answering(self) -> list[PoolWorker]:
        """Members with something to say, after at most POLL_SECONDS. Raises Interrupted."""
        self._context.stop.check()
        owing = {id(member.handle): member for member in self._members if member.busy or not member.stands}
        found = self._backend.answering([member.handle for member in owing.values()], POLL_SECONDS)
        return [owing[id(handle)] for handle in found]

    def _answer(self, member: PoolWorker, backlog: BlockQueue, plan: RunPlan, task: ReferenceTask | PolicyTask) -> None:
        """One message of one worker."""
        try:
            said = member.handle.answer()
        except LostError as error:
            if member.busy:
                self._lost(member, str(error), backlog, plan, task)
            else:
                self._dismiss(member, error)
        except GroupLostError as error:
            self._lost(member, error.reason, backlog, plan, task)
        except Exception:
            self._stop_others()
            raise
        else:
            self._take(member, said, backlog, plan)

    def _take(self, member: PoolWorker, said: WorkerReady | Report | None, backlog: BlockQueue, plan: RunPlan) -> None:
        if isinstance(said, WorkerReady):
            member.stands = True
        elif said is None:
            member.busy = False
            backlog.lost(member.left)
        else:
            self._relay(said)
            if said.block is not None:
                member.left.remove(said.block)
                self._context.progress.rows(plan.rows.count([said.block]))

    def _dismiss(self, member: PoolWorker, error: LostError) -> None:
        """It does not stand. Those who do go on, and nobody is hired in its place, who would meet the same machine."""
        self._members.remove(member)
        member.handle.kill()
        member.handle.see_dead()
        if not any(other.stands for other in self._members):
            raise _not_started(error) from None
        self._most = len(self._members)
        self._context.progress.warn(f"{_not_started(error)}. The others go on without it")

    def _stop_others(self) -> None:
        """A stage has failed: whoever still works on it begins anew, the worker that failed included."""
        for member in self._members:
            if member.busy:
                self._restart(member)

    @staticmethod
    def _restart(member: PoolWorker) -> None:
        member.left, member.busy, member.stands = [], False, False
        member.handle.restart()

    def _relay(self, report: Report) -> None:
        progress = self._context.progress
        for line in report.said:
            progress.say(line)
        for line in report.warned:
            progress.warn(line)
        if report.tokens:
            progress.tokens(report.tokens)

    def _lost(
        self, member: PoolWorker, reason: str, backlog: BlockQueue, plan: RunPlan, task: ReferenceTask | PolicyTask
    ) -> None:
        """A worker died: what it had not committed goes back, and it is waited for again."""
        gone = [block for block in member.left if not self._committed(block, plan, task)]
        why = f" ({reason})" if reason else ""
        self._context.progress.warn(f"a worker was lost{why}: {len(gone)} blocks of {task.stage} go to others")
        self._context.progress.rows(plan.rows.count(set(member.left) - set(gone)))
        self._restart(member)
        backlog.lost(gone)

    def _committed(self, block: int, plan: RunPlan, task: ReferenceTask | PolicyTask) -> bool:
        name = record_name(task.stage, block, plan.rows.blocks)
        if not self._context.store.exists(name):
            return False
        found = read_record(self._context.store, name)
        return isinstance(found, CommitRecord) and found.identity == task.identity


def explicit(config: RunConfig, context: RunContext, threads: int) -> RunConfig:
    """What other processes would decide by themselves, decided here: the thread count (`threads` where neither OUT
    nor the user says another) and the cache folder."""
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


# --- backlog ------------------------------------------------------------


LONGEST_RUN = 32
"""Blocks handed out at once: a large row group is read once for them, and what is lost is asked for again soon."""
ATTEMPTS = 3


class BlockQueue:
    """Blocks of one stage that nobody works on yet, in order."""

    def __init__(self, todo: Sequence[int]) -> None:
        self._runs: deque[list[int]] = deque([list(todo)] if todo else [])
        self._losses: Counter[int] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def take(self, workers: int) -> tuple[int, ...]:
        """The next run for one of `workers`; empty when nothing is left."""
        if not self._runs:
            return ()
        size = max(1, min(LONGEST_RUN, len(self) // (2 * max(workers, 1))))
        first = self._runs[0]
        taken, rest = first[:size], first[size:]
        if rest:
            self._runs[0] = rest
        else:
            self._runs.popleft()
        return tuple(taken)

    def lost(self, blocks: Iterable[int]) -> None:
        """Blocks whose worker died, the one it was at first. StorageError when that happens to a block too often."""
        run = list(blocks)
        if not run:
            return
        self._losses[run[0]] += 1
        if self._losses[run[0]] >= ATTEMPTS:
            raise StorageError(
                f"block {run[0]} has cost {ATTEMPTS} workers their lives (out of memory is the usual cause: a smaller "
                "--batch-tokens in a new output folder needs less). The same command resumes"
            )
        self._runs.appendleft(run)
