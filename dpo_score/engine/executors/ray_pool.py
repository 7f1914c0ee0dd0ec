"""Workers as actors of a Ray cluster: Ray places them and starts a dead one again, on another node if it must.

A worker is one actor with all the devices of one replica, so they are on one node; the other ranks of a
tensor-parallel group are its own child processes.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_score.config.schema import RunConfig
from dpo_score.engine.executors.pool import LostError, WorkerHandle
from dpo_score.engine.executors.worker import Assignment, Report, Worker, WorkerReady
from dpo_score.errors import DpoScoreError
from dpo_score.storage.paths import alive

KILLED_SECONDS = 10.0
ROOM_SECONDS = 10.0
"""How long a count of the cluster's devices is good for: nodes join while a run works."""


@dataclass(frozen=True, slots=True)
class Device:
    """What one worker asks of the cluster. `workers`: as many as were asked for, None for as many as fit."""

    cpus: int
    gpus: int
    workers: int | None = None

    def room(self, resources: Mapping[str, float]) -> int:
        """How many such workers a cluster has place for; one, that waits, where there is none."""
        if self.workers is not None:
            return self.workers
        there = resources.get("GPU", 0) if self.gpus else resources.get("CPU", 0)
        return max(int(there) // (self.gpus or self.cpus), 1)


class RayWorkerHandle:
    """One actor. `awaited`: the answer that it owes, or the stream of them."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._standing: WorkerReady | None = None
        self._dead = self._streaming = False
        self.awaited: Any = None
        self._stand()

    def _stand(self) -> None:
        """Answered when the worker stands, however often it has to be started."""
        self._dead = self._streaming = False
        self.awaited = self._actor.ready.options(max_task_retries=-1).remote()

    def decide(self) -> None:
        self.awaited = self._actor.decide.remote()

    def work(self, assignment: Assignment) -> None:
        self.awaited = self._actor.work.options(num_returns="streaming").remote(assignment)
        self._streaming = True

    def answer(self) -> WorkerReady | Report | None:
        errors = self._ray.exceptions
        try:
            return self._answer()
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayActorError as error:
            raise self._lost(error, line=-1) from None
        except (errors.OutOfMemoryError, errors.NodeDiedError, errors.WorkerCrashedError) as error:
            raise self._lost(error, line=0) from None
        except errors.RayError as error:
            raise _failed(error) from None

    def _lost(self, error: Exception, line: int) -> LostError:
        """`line`: the one of Ray's that tells the cause."""
        self._dead = True
        return LostError((str(error).strip().splitlines() or [""])[line].strip())

    def _answer(self) -> WorkerReady | Report | None:
        if self._streaming:
            try:
                report: Report = self._ray.get(next(self.awaited))
            except StopIteration:
                self.awaited, self._streaming = None, False
                return None
            return report
        found: WorkerReady | Report = self._ray.get(self.awaited)
        self.awaited = None
        if isinstance(found, WorkerReady):
            self._standing = found
        return found

    def restart(self) -> None:
        if not self._dead:
            self._ray.kill(self._actor, no_restart=False)
        self._stand()

    def kill(self) -> None:
        self._ray.kill(self._actor, no_restart=True)

    def see_dead(self) -> None:
        """On this machine the process is watched; on others Ray's word is taken."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.get(self._actor.ready.remote(), timeout=KILLED_SECONDS)
        found, until = self._standing, time.monotonic() + KILLED_SECONDS
        while found is not None and found.host == platform.node() and alive(found.process):
            if time.monotonic() > until:
                return
            time.sleep(0.02)


class RayBackend:
    """A cluster that this process has joined."""

    def __init__(self, ray: Any, device: Device) -> None:
        self._ray, self._device = ray, device
        self._room, self._counted = 0, -ROOM_SECONDS
        self._kind = ray.remote(num_cpus=device.cpus, num_gpus=device.gpus, max_restarts=-1, max_task_retries=0)(Worker)

    @property
    def room(self) -> int:
        """Counted anew after ROOM_SECONDS."""
        now = time.monotonic()
        if now - self._counted >= ROOM_SECONDS:
            self._room, self._counted = self._device.room(self._ray.cluster_resources()), now
        return self._room

    @property
    def needs(self) -> str:
        """What one worker waits for."""
        gpus, cpus = self._device.gpus, self._device.cpus
        return "a GPU" if gpus == 1 else f"{gpus or cpus} {'GPUs' if gpus else 'CPU cores'} on one node"

    @property
    def has(self) -> str:
        there = self._ray.cluster_resources()
        return f"{there.get('CPU', 0):g} CPU cores and {there.get('GPU', 0):g} GPUs in the cluster"

    def start_worker(self, config: RunConfig) -> WorkerHandle:
        return RayWorkerHandle(self._ray, self._kind.remote(config, str(Path.cwd())))

    def answering(self, handles: Sequence[WorkerHandle], seconds: float) -> list[WorkerHandle]:
        owed = {handle.awaited: handle for handle in handles if isinstance(handle, RayWorkerHandle)}
        ready, _ = self._ray.wait(list(owed), num_returns=1, timeout=seconds, fetch_local=False)
        return [owed[each] for each in ready]


def _failed(error: Exception) -> DpoScoreError:
    """What Ray could not do, where no worker's death explains it."""
    what = " ".join(str(error).split())
    return DpoScoreError(
        f"Ray failed to run a worker ({type(error).__name__}: {what}). Committed blocks are kept: once the cluster is "
        "sound the same command resumes, and --engine local needs no Ray"
    )
