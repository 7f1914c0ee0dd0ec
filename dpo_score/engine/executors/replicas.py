"""Models larger than a device on one machine: N devices hold a replica, and G/N replicas take runs of blocks.

    this process (lock, manifest, backlog) ──▶ worker = rank 0 of a replica ──▶ ranks 1 … N-1, its child processes

Promises: the results of one such replica; a rank that dies costs its replica the blocks it had begun, and the replica
is started again. Rank 0 reads, renders, plans and commits; the others compute with it (logps/leader.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dpo_score.config.schema import RunConfig
from dpo_score.engine.context import RunContext
from dpo_score.engine.executors.pool import WorkerPool, explicit
from dpo_score.engine.executors.processes import ProcessPlace
from dpo_score.errors import ConfigError
from dpo_score.models.numerics import Numerics
from dpo_score.storage.manifest import read_manifest


@contextmanager
def with_workers(config: RunConfig, context: RunContext) -> Iterator[RunConfig]:
    """The desk with a crew of replicas; yields the configuration with what they must agree on spelt out."""
    devices = _devices(config, context)
    cores = max((os.cpu_count() or 1) // (len(devices) * config.compute.tensor_parallel), 1)
    config = explicit(config, context, cores)
    with WorkerPool(ProcessPlace(devices), config, context) as pool:
        if read_manifest(context.store) is None:
            pool.decide()
        context.pool = pool
        yield config


def _devices(config: RunConfig, context: RunContext) -> Sequence[str | None]:
    """For each replica, the devices that it sees."""
    return gpu_replicas(config) if _on_gpus(config, context) else [None] * (config.compute.workers or 1)


def gpu_replicas(config: RunConfig) -> list[str]:
    """CUDA_VISIBLE_DEVICES of as many replicas as are asked for, else as there is room for; ConfigError for none."""
    ways, wanted, found = config.compute.tensor_parallel, config.compute.workers, _visible()
    if len(found) < ways:
        raise ConfigError(f"--tensor-parallel {ways}: only {len(found)} CUDA devices are visible here")
    replicas = [",".join(found[first : first + ways]) for first in range(0, len(found) - ways + 1, ways)]
    if wanted is not None and wanted > len(replicas):
        raise ConfigError(
            f"--workers {wanted} with --tensor-parallel {ways} needs {wanted * ways} GPUs; {len(found)} are visible"
        )
    return replicas[:wanted]


def _visible() -> list[str]:
    """The CUDA devices that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def _on_gpus(config: RunConfig, context: RunContext) -> bool:
    """As OUT has decided, else as asked, else where there are any."""
    import torch

    asked, found = config.compute.device, read_manifest(context.store)
    if ":" in asked:
        raise ConfigError(f"--device {asked} names one GPU; --tensor-parallel takes several: say --device cuda")
    if found is not None and found.numerics.get("run"):
        asked = Numerics.from_json(found.numerics["run"]).device_kind
    return asked == "cuda" or (asked == "auto" and torch.cuda.is_available())
