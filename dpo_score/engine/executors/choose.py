"""Which engine a run goes to: one process, replicas of a large model, a share of an array, a Ray cluster."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

from dpo_score.config.schema import RunConfig
from dpo_score.engine import run as local
from dpo_score.engine.context import RunContext
from dpo_score.engine.executors import job_array as shares
from dpo_score.engine.finish import Outcome
from dpo_score.engine.prepare import prepare
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import discard_results
from dpo_score.errors import ConfigError


def run(config: RunConfig, progress: Progress, restart: bool = False) -> Outcome:
    """Score every policy of `config`, wherever that happens. Raises as `local.run` does."""
    engine = chosen(config, progress)
    if config.blocks is not None:
        if config.compute.engine == "ray":
            raise ConfigError("--blocks and --engine ray both divide the work: choose one")
        return shares.run_share(config, progress, restart)
    if engine == "local" and config.compute.tensor_parallel == 1:
        return local.run(config, progress, restart)
    with local.run_context(config, progress, local.check(config)) as context:
        if restart:
            discard_results(context.store)
        with _crew_of(engine, config, context) as config:
            plan, manifest = prepare(config, context)
            failures = local.run_stages(context, plan, manifest)
        return local.ended(context, plan, failures)


def with_workers(config: RunConfig, context: RunContext) -> AbstractContextManager[RunConfig]:
    """`desk` with a crew where the engine has one; yields the configuration to go on with."""
    return _crew_of(chosen(config, context.progress), config, context)


def _crew_of(engine: str, config: RunConfig, context: RunContext) -> AbstractContextManager[RunConfig]:
    if engine == "ray":
        from dpo_score.engine.executors import ray

        return ray.with_workers(config, context)
    if config.compute.tensor_parallel > 1:
        from dpo_score.engine.executors import replicas

        return replicas.with_workers(config, context)
    return nullcontext(config)


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
    if compute.tensor_parallel > 1:
        return "local"
    progress.say(
        f"{gpus - 1} of {gpus} GPUs stay idle: with Ray (pip install 'dpo-score[ray]') one run uses them all; without "
        "it, --blocks 0/N … N-1/N, each process with its own CUDA_VISIBLE_DEVICES"
    )
    return "local"


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
