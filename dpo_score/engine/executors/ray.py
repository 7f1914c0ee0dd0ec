"""The same stages on a Ray cluster: one worker per replica holds the model and takes runs of blocks.

    driver (lock, manifest, backlog) ──Assignment──▶ worker: reads, renders, computes, commits    ──Report──▶ driver

Promises: bytes as a local run writes them; a run begun here is continued there and the other way round; a worker or
node that is lost costs at most the blocks it had begun; errors, exit codes and signals are those of a local run. Ray
places and restarts the workers and asks an autoscaler for nodes. Not promised: data, models, CACHE and OUT must be
under the same paths, or on an object store, for all machines.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dpo_score.config.schema import RunConfig
from dpo_score.engine.context import RunContext
from dpo_score.engine.executors.pool import WorkerPool, explicit
from dpo_score.engine.executors.ray_pool import Device, RayBackend
from dpo_score.engine.signals import SIGNALS
from dpo_score.errors import ConfigError, DpoScoreError
from dpo_score.logprobs.numerics import Numerics
from dpo_score.storage.manifest import read_manifest

if TYPE_CHECKING:
    from types import ModuleType

CONNECT_SECONDS = 10.0
STARTS = 3
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""No usage reports to anybody, and no advice about a default of Ray's that is not used here."""


@contextmanager
def with_workers(config: RunConfig, context: RunContext) -> Iterator[RunConfig]:
    """The desk with a crew on a cluster; yields the configuration with what the machines must agree on spelt out."""
    ray = _ray()
    with _cluster(ray, config):
        config = explicit(config, context, _threads(config))
        with WorkerPool(RayBackend(ray, _device(ray, config, context)), config, context) as pool:
            if read_manifest(context.store) is None:
                pool.decide()
            context.pool = pool
            yield config


def _ray() -> ModuleType:
    if find_spec("ray") is None:
        raise ConfigError("--engine ray needs Ray, which is not installed: pip install 'dpo-score[ray]'")
    import ray

    found: ModuleType = ray
    return found


@contextmanager
def _cluster(ray: Any, config: RunConfig) -> Iterator[None]:
    """A cluster: the one this process has joined, else that at --ray-address or RAY_ADDRESS, else one made here."""
    if ray.is_initialized():
        yield
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    address = config.compute.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    _refuse_unreachable(address)
    heard = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        _join(ray, address)
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _join(ray: Any, address: str) -> None:
    """Connected afterwards. A cluster of its own that does not stand in time is begun again on a busy machine."""
    for again in reversed(range(STARTS)):
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"no Ray cluster at {address}: {' '.join(str(error).split())}") from None
        except Exception as error:  # Ray has no narrower one for a node that did not stand within 30 s
            ray.shutdown()
            if not again or address != "local":
                raise DpoScoreError(
                    f"Ray does not start ({' '.join(str(error).split())}). This machine may be overloaded or short of "
                    "memory; the same command resumes, and --engine local needs no Ray"
                ) from error
        else:
            return


def _refuse_unreachable(address: str) -> None:
    """ConfigError within seconds where nobody listens: Ray itself would try for minutes."""
    if address.startswith("ray://"):
        raise ConfigError(f"--ray-address {address}: Ray Client is not used; start on the head, or by `ray job submit`")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}") from None


def _threads(config: RunConfig) -> int:
    """Threads of one process: the ranks of a worker share its machine."""
    import torch

    return max(torch.get_num_threads() // config.compute.tensor_parallel, 1)


def _device(ray: Any, config: RunConfig, context: RunContext) -> Device:
    """As many GPUs as a replica has ranks where the run computes on GPUs, else --threads cores for each rank."""
    there, asked, ways = ray.cluster_resources(), config.compute.device, config.compute.tensor_parallel
    if ":" in asked:
        raise ConfigError(f"--device {asked} names one GPU; Ray gives each worker its own: say --device cuda")
    found = read_manifest(context.store)
    if found is not None and found.numerics.get("run"):
        asked = Numerics.from_json(found.numerics["run"]).device_kind
    if asked == "cuda" or (asked == "auto" and int(there.get("GPU", 0))):
        return Device(ways, ways, config.compute.workers)
    return Device(int(config.compute.threads or 1) * ways, 0, config.compute.workers)
