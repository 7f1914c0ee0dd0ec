"""Who computes the blocks of a run: this process, one share of a job array, or workers of a Ray cluster.

One worker, also one whose model is divided over several devices, is this process. More than one is Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec

from dpo_score.config.schema import RunConfig
from dpo_score.engine import run as one_process
from dpo_score.engine.context import RunContext
from dpo_score.engine.executors import job_array
from dpo_score.engine.finish import Outcome
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError

INSTALL_RAY = "pip install 'dpo-score[ray]'"


class Executor(Enum):
    LOCAL = "local"
    RAY = "ray"


def run(config: RunConfig, progress: Progress, restart: bool = False) -> Outcome:
    """Score every policy of `config`, wherever that happens. Raises as `engine.run.run` does."""
    if config.blocks is not None:
        if config.compute.engine == "ray":
            raise ConfigError("--blocks and --engine ray both divide the work: choose one")
        return job_array.run_share(config, progress, restart)
    return one_process.run(config, progress, restart, with_workers)


@contextmanager
def with_workers(config: RunConfig, context: RunContext) -> Iterator[tuple[RunConfig, RunContext]]:
    """The configuration and the context to go on with: with workers where the executor has any."""
    if choose_executor(config, context.progress) is Executor.LOCAL:
        yield config, context
        return
    from dpo_score.engine.executors.ray import with_ray_workers

    with with_ray_workers(config, context) as found:
        yield found


def choose_executor(config: RunConfig, progress: Progress) -> Executor:
    """`auto` is Ray where an address is given, several workers are asked for, or there are GPUs for more than one
    worker and Ray is installed. ConfigError for several workers without Ray.
    """
    compute = config.compute
    several = (compute.workers or 1) > 1
    if compute.engine == "local" and several:
        raise ConfigError(f"--workers {compute.workers} needs Ray, and --engine local is one worker: leave one out")
    if compute.engine != "auto":
        return Executor(compute.engine)
    if compute.ray_address is not None:
        return Executor.RAY
    if several and config.blocks is None:
        if find_spec("ray") is None:
            raise ConfigError(f"--workers {compute.workers} needs Ray, which is not installed: {INSTALL_RAY}")
        return Executor.RAY
    gpus = _gpus() if compute.device in ("auto", "cuda") and compute.device_map is None else 1
    idle = gpus - compute.tensor_parallel
    if idle < compute.tensor_parallel or compute.workers == 1 or config.blocks is not None:
        return Executor.LOCAL
    if find_spec("ray") is not None:
        return Executor.RAY
    progress.say(
        f"{idle} of {gpus} GPUs stay idle: with Ray ({INSTALL_RAY}) one run uses them all; without it, --blocks 0/N … "
        "N-1/N, each process with its own CUDA_VISIBLE_DEVICES"
    )
    return Executor.LOCAL


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
