"""Which engine a run goes to: one process, a share of an array, or a Ray cluster. The results are the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from dpo_score.config import RunConfig
from dpo_score.errors import ConfigError
from dpo_score.run import local, shares
from dpo_score.run.desk import Desk
from dpo_score.run.finish import Outcome
from dpo_score.run.progress import Progress


def run(config: RunConfig, progress: Progress, restart: bool = False) -> Outcome:
    """Score every policy of `config`, wherever that happens. Raises as `local.run` does."""
    engine = chosen(config, progress)
    if config.blocks is not None:
        if config.compute.engine == "ray":
            raise ConfigError("--blocks and --engine ray both divide the work: choose one")
        return shares.run_share(config, progress, restart)
    if engine == "ray":
        from dpo_score.run import ray

        return ray.run(config, progress, restart)
    return local.run(config, progress, restart)


@contextmanager
def crewed(config: RunConfig, desk: Desk) -> Iterator[RunConfig]:
    """`desk` with a crew where the engine has one; yields the configuration to go on with."""
    if chosen(config, desk.progress) == "ray":
        from dpo_score.run import ray

        with ray.crewed(config, desk) as settled:
            yield settled
    else:
        yield config


def chosen(config: RunConfig, progress: Progress) -> str:
    """`local` or `ray`: `auto` is ray where an address is given, or several GPUs are visible and Ray is installed."""
    compute = config.compute
    if compute.engine != "auto":
        return compute.engine
    if compute.ray_address is not None:
        return "ray"
    gpus = _gpus() if compute.device in ("auto", "cuda") and compute.device_map is None else 1
    if gpus < 2 or config.blocks is not None:
        return "local"
    if find_spec("ray") is not None:
        return "ray"
    progress.say(
        f"{gpus - 1} of {gpus} GPUs stay idle: with Ray (pip install 'dpo-score[ray]') one run uses them all; without "
        "it, --blocks 0/N … N-1/N, each process with its own CUDA_VISIBLE_DEVICES"
    )
    return "local"


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
