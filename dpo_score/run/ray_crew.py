"""The workers of one run on a Ray cluster, as the driver sees them: who has which blocks, who answers, who was lost.

Promises: every block is handed out until one worker has committed it; a worker's error is raised here as its own;
signals are heard at any time; when the crew is left its processes are dead. Ray starts a dead worker again, on
another node if it must.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_score.config import RunConfig
from dpo_score.errors import StorageError
from dpo_score.run.backlog import Backlog
from dpo_score.run.desk import Desk
from dpo_score.run.job import Job, PolicyJob, ReferenceJob
from dpo_score.run.worker import Assignment, Report, Worker
from dpo_score.store.manifest import reopen_manifest
from dpo_score.store.names import alive
from dpo_score.store.records import CommitRecord, read_record, record_name

POLL_SECONDS = 0.5
KILLED_SECONDS = 10.0
SLOW_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Device:
    """What one worker asks of the cluster, and how many such workers there is room for now."""

    cpus: int
    gpus: int
    count: int


@dataclass(eq=False)
class Hand:
    """One worker as the driver sees it. `left`: blocks it was given and has not reported; `awaited`: what it owes."""

    actor: Any
    awaited: Any
    left: list[int]
    busy: bool = False
    host: str = ""
    process: int = 0


def _ready(actor: Any) -> Any:
    """Answered when the worker stands, however often it has to be started."""
    return actor.ready.options(max_task_retries=-1).remote()


def _resources(ray: Any) -> str:
    there = ray.cluster_resources()
    return f"{there.get('CPU', 0):g} CPU cores and {there.get('GPU', 0):g} GPUs"


def _not_started(error: Exception) -> StorageError:
    lines = str(error).strip().splitlines() or ["no reason given"]
    return StorageError(
        f"a Ray worker does not start ({lines[-1].strip()}). Every node needs dpo-score with the same versions "
        "installed, and the memory that the model takes"
    )


class RayCrew:
    """The workers of one run. Ray starts a dead one again, on another node if it must."""

    def __init__(self, ray: Any, config: RunConfig, desk: Desk, device: Device) -> None:
        self._ray, self._desk = ray, desk
        kind = ray.remote(num_cpus=device.cpus, num_gpus=device.gpus, max_restarts=-1, max_task_retries=0)(Worker)
        self._make: Callable[[], Any] = lambda: kind.remote(config, str(Path.cwd()))
        self._device, self._room = device, device.count
        self._hands: list[Hand] = []

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the workers and see them dead before OUT is unlocked."""
        for hand in self._hands:
            self._ray.kill(hand.actor, no_restart=True)
        for hand in self._hands:
            self._await_death(hand)

    def _await_death(self, hand: Hand) -> None:
        """On this machine the process is watched; on others Ray's word is taken."""
        with suppress(self._ray.exceptions.RayActorError, self._ray.exceptions.GetTimeoutError):
            self._ray.get(hand.actor.ready.remote(), timeout=KILLED_SECONDS)
        until = time.monotonic() + KILLED_SECONDS
        while hand.host == platform.node() and alive(hand.process) and time.monotonic() < until:
            time.sleep(0.02)

    def decide(self) -> None:
        """One worker resolves the numerics on the device that will compute, and writes the manifest."""
        self._begin()
        self._relay(self._awaited(self._hands[0].actor.decide.remote(), "numerics are not decided yet"))

    def work(self, job: Job, task: ReferenceJob | PolicyJob, todo: Sequence[int]) -> None:
        """All of `todo` committed, by whoever is free."""
        reopen_manifest(self._desk.store)
        self._begin()
        self._hire(min(self._room, len(todo)))
        backlog, rows = Backlog(todo), job.rows
        label = task.name if isinstance(task, PolicyJob) else task.label
        with self._desk.progress.stage(label, rows.mine, rows.mine - rows.count(todo)):
            while backlog or any(hand.busy for hand in self._hands):
                self._hand_out(backlog, task)
                for hand in self._answering():
                    self._answer(hand, backlog, job, task)

    def _begin(self) -> None:
        """The first worker stands; said where that takes long, since Ray waits for room in silence."""
        if not self._hands:
            self._hire(1)
            needs = "a GPU" if self._device.gpus else f"{self._device.cpus} CPU cores on one node"
            first = self._hands[0]
            first.host, first.process = self._awaited(first.awaited, f"no worker stands yet; each needs {needs}")
            first.awaited = None

    def _awaited(self, reference: Any, what: str) -> Any:
        """What `reference` becomes; signals are heard meanwhile."""
        slow = time.monotonic() + SLOW_SECONDS
        while not self._ray.wait([reference], timeout=POLL_SECONDS)[0]:
            self._desk.stop.check()
            if time.monotonic() > slow:
                slow = float("inf")
                self._desk.progress.say(f"{what}; the cluster has {_resources(self._ray)}")
        try:
            return self._result(reference)
        except self._ray.exceptions.RayActorError as error:
            raise _not_started(error) from None

    def _hire(self, count: int) -> None:
        while len(self._hands) < count:
            actor = self._make()
            self._hands.append(Hand(actor, _ready(actor), []))

    def _hand_out(self, backlog: Backlog, task: ReferenceJob | PolicyJob) -> None:
        for hand in self._hands:
            if hand.awaited is None and backlog:
                blocks = backlog.take(len(self._hands))
                hand.left, hand.busy = list(blocks), True
                work = hand.actor.work.options(num_returns="streaming")
                hand.awaited = work.remote(Assignment.of(task, blocks))

    def _answering(self) -> list[Hand]:
        """Hands with something to say, after at most POLL_SECONDS. Raises Interrupted."""
        self._desk.stop.check()
        owed = {hand.awaited: hand for hand in self._hands if hand.awaited is not None}
        ready, _ = self._ray.wait(list(owed), num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
        return [owed[each] for each in ready]

    def _answer(self, hand: Hand, backlog: Backlog, job: Job, task: ReferenceJob | PolicyJob) -> None:
        """One message of one worker."""
        try:
            if hand.busy:
                self._report(hand, self._result(next(hand.awaited)), job)
            else:
                hand.host, hand.process = self._result(hand.awaited)
                hand.awaited = None
        except StopIteration:
            hand.awaited, hand.busy = None, False
            backlog.lost(hand.left)
        except self._ray.exceptions.RayActorError as error:
            if not hand.busy:
                raise _not_started(error) from None
            self._lost(hand, backlog, job, task)

    def _result(self, reference: Any) -> Any:
        """What a worker returns, or raises: its own error, as if it had been raised here."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            self._stop_others()
            raise error.cause from None

    def _stop_others(self) -> None:
        """A stage has failed: whoever still works on it begins anew."""
        for hand in self._hands:
            if hand.busy:
                self._ray.kill(hand.actor, no_restart=False)
                hand.left, hand.busy, hand.awaited = [], False, _ready(hand.actor)

    def _report(self, hand: Hand, report: Report, job: Job) -> None:
        self._relay(report)
        if report.block is not None:
            hand.left.remove(report.block)
            self._desk.progress.rows(job.rows.count([report.block]))

    def _relay(self, report: Report) -> None:
        progress = self._desk.progress
        for line in report.said:
            progress.say(line)
        for line in report.warned:
            progress.warn(line)
        if report.tokens:
            progress.tokens(report.tokens)

    def _lost(self, hand: Hand, backlog: Backlog, job: Job, task: ReferenceJob | PolicyJob) -> None:
        """A worker died: what it had not committed goes back, and it is waited for again."""
        gone = [block for block in hand.left if not self._committed(block, job, task)]
        self._desk.progress.warn(f"a worker was lost: {len(gone)} blocks of {task.stage} go to others")
        self._desk.progress.rows(job.rows.count(set(hand.left) - set(gone)))
        hand.left, hand.busy, hand.awaited = [], False, _ready(hand.actor)
        backlog.lost(gone)

    def _committed(self, block: int, job: Job, task: ReferenceJob | PolicyJob) -> bool:
        name = record_name(task.stage, block, job.rows.blocks)
        if not self._desk.store.exists(name):
            return False
        found = read_record(self._desk.store, name)
        return isinstance(found, CommitRecord) and found.identity == task.identity
