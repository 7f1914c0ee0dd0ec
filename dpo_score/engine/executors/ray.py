"""The same stages on a Ray cluster: each worker holds the model and takes runs of blocks.

    driver (lock, manifest, block queue) ──Assignment──▶ worker: reads, renders, computes, commits    ──Report──▶ driver

The bytes are those of a run in one process; a run begun here is continued there and the other way round. A worker or
node that is lost costs at most the blocks it had begun. Errors, exit codes and signals are those of a local run. Ray
places the workers, starts a dead one again, on another node if it must, and asks an autoscaler for nodes. Data, models,
CACHE and OUT must be under the same paths, or on an object store, for all machines.

A worker is one actor with all the devices of one replica of the model, so they are on one node; the other ranks of a
tensor-parallel group are its own child processes.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from dpo_score.config.schema import RunConfig
from dpo_score.engine.context import RunContext
from dpo_score.engine.executors.pool import LostError, WorkerHandle, WorkerPool, shared_config
from dpo_score.engine.executors.worker import Assignment, Report, Worker, WorkerReady
from dpo_score.engine.signals import SIGNALS
from dpo_score.errors import ConfigError, DpoScoreError
from dpo_score.models.numerics import Numerics
from dpo_score.storage.manifest import read_manifest
from dpo_score.storage.paths import alive

CONNECT_SECONDS = 10.0
STARTS = 3
KILLED_SECONDS = 10.0
COUNT_SECONDS = 10.0
"""How long a count of the cluster's devices is good for: nodes join while a run works."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_COLOR_PREFIX": "0"}
"""No usage reports to anybody, and no advice about a default of Ray's that is not used here."""


@contextmanager
def with_ray_workers(config: RunConfig, context: RunContext) -> Iterator[tuple[RunConfig, RunContext]]:
    """The context with workers on a cluster, and the configuration with what all machines must agree on."""
    if find_spec("ray") is None:
        raise ConfigError("--engine ray needs Ray, which is not installed: pip install 'dpo-score[ray]'")
    import ray
    import torch

    with _cluster(ray, config):
        threads = max(torch.get_num_threads() // config.compute.tensor_parallel, 1)  # a worker's ranks share a machine
        config = shared_config(config, context, threads)
        with WorkerPool(RayBackend(ray, _device(ray, config, context)), config, context) as pool:
            if read_manifest(context.store) is None:
                pool.decide()
            yield config, replace(context, workers=pool)


# --- the cluster ------------------------------------------------------------------------------------------------------


@contextmanager
def _cluster(ray: ModuleType, config: RunConfig) -> Iterator[None]:
    """A cluster: the one this process has joined, else that at --ray-address or RAY_ADDRESS, else one made here."""
    if ray.is_initialized():
        yield
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    address = config.compute.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    _refuse_unreachable(address)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        _join(ray, address)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        with _guarded(ray, own=address == "local"):
            yield
    finally:
        ray.shutdown()


@contextmanager
def _guarded(ray: Any, own: bool) -> Iterator[None]:
    """A process beside this one says how to go on where Ray ends this one (ray_guard.py)."""
    socket_name = str(ray.nodes()[0].get("ObjectStoreSocketName", "")) if own else ""
    session = next((part for part in socket_name.split("/") if part.startswith("session_")), "")
    guard = subprocess.Popen(
        [sys.executable, "-m", "dpo_score.engine.executors.ray_guard", session],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert guard.stdin is not None
    assert guard.stdout is not None
    lost = guard.stdout

    def end_when_told() -> None:
        if lost.read(1):
            os._exit(1)

    threading.Thread(target=end_when_told, name="ray-guard", daemon=True).start()
    try:
        yield
    finally:
        with suppress(BrokenPipeError):
            guard.stdin.write(b"done")
            guard.stdin.close()
        guard.wait()


def _join(ray: Any, address: str) -> None:
    """Connected afterwards. A cluster of its own that does not start in time is started again on a busy machine."""
    for again in reversed(range(STARTS)):
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"no Ray cluster at {address}: {' '.join(str(error).split())}") from None
        except Exception as error:  # Ray has no narrower one for a node that did not start within 30 s
            ray.shutdown()
            if not again or address != "local":
                raise DpoScoreError(
                    f"Ray does not start ({' '.join(str(error).split())}). This machine may be overloaded or short of "
                    "memory; the same command resumes, and --engine local needs no Ray"
                ) from error
        else:
            # Ray prints what its node reports ("Task … failed") to standard output, where a result or its JSON is
            # expected; there is no public switch for it. What matters of it is said by the worker pool.
            from ray._private import worker

            worker._worker_logs_enabled = False
            return


def _refuse_unreachable(address: str) -> None:
    """ConfigError within seconds where no cluster answers: Ray itself would try for minutes."""
    if address.startswith("ray://"):
        raise ConfigError(f"--ray-address {address}: Ray Client is not used; start on the head, or by `ray job submit`")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}") from None


@dataclass(frozen=True, slots=True)
class Device:
    """What one worker asks of the cluster. `workers`: as many as were asked for, None for as many as fit."""

    cpus: int
    gpus: int
    workers: int | None = None

    def capacity(self, resources: Mapping[str, float]) -> int:
        """How many such workers fit into a cluster; where none fits, one, which waits."""
        if self.workers is not None:
            return self.workers
        there = resources.get("GPU", 0) if self.gpus else resources.get("CPU", 0)
        return max(int(there) // (self.gpus or self.cpus), 1)


def _device(ray: Any, config: RunConfig, context: RunContext) -> Device:
    """As many GPUs as a replica has ranks where the run computes on GPUs, else --threads cores for each rank."""
    there, asked, ranks = ray.cluster_resources(), config.compute.device, config.compute.tensor_parallel
    if ":" in asked:
        raise ConfigError(f"--device {asked} names one GPU; Ray gives each worker its own: say --device cuda")
    found = read_manifest(context.store)
    if found is not None and found.numerics.get("run"):
        asked = Numerics.from_json(found.numerics["run"]).device_kind
    if asked == "cuda" or (asked == "auto" and int(there.get("GPU", 0))):
        return Device(ranks, ranks, config.compute.workers)
    return Device(int(config.compute.threads or 1) * ranks, 0, config.compute.workers)


# --- workers ----------------------------------------------------------------------------------------------------------


class RayWorkerHandle:
    """One actor. `awaited`: the answer that it owes, or the stream of them."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._at: WorkerReady | None = None
        self._dead = self._streaming = False
        self.awaited: Any = None
        self._ask_ready()

    def _ask_ready(self) -> None:
        """Answered when the worker is ready, however often it has to be started."""
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
            self._at = found
        return found

    def restart(self) -> None:
        if not self._dead:
            self._ray.kill(self._actor, no_restart=False)
        self._ask_ready()

    def kill(self) -> None:
        self._ray.kill(self._actor, no_restart=True)

    def wait_dead(self) -> None:
        """On this machine the process is watched; of others Ray's word is taken."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.get(self._actor.ready.remote(), timeout=KILLED_SECONDS)
        found, until = self._at, time.monotonic() + KILLED_SECONDS
        while found is not None and found.host == platform.node() and alive(found.process):
            if time.monotonic() > until:
                return
            time.sleep(0.02)


class RayBackend:
    """A cluster that this process has joined."""

    def __init__(self, ray: Any, device: Device) -> None:
        self._ray, self._device = ray, device
        self._capacity, self._counted = 0, -COUNT_SECONDS
        self._kind = ray.remote(num_cpus=device.cpus, num_gpus=device.gpus, max_restarts=-1, max_task_retries=0)(Worker)

    @property
    def capacity(self) -> int:
        """Counted anew after COUNT_SECONDS."""
        now = time.monotonic()
        if now - self._counted >= COUNT_SECONDS:
            self._capacity, self._counted = self._device.capacity(self._ray.cluster_resources()), now
        return self._capacity

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
