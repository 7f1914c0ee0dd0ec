"""What a block costs beside its forward passes, and whether the driver's memory grows with their number.

    python -m tests.benchmarks.bench_blocks                          20,000 blocks of one pair in this process
    python -m tests.benchmarks.bench_blocks --engine ray --workers 2
    python -m tests.benchmarks.bench_blocks --blocks 5000 --out /mnt/shared/bench
    python -m tests.benchmarks.bench_blocks --blocks 0 --cached 40000

No model: stage one takes its values from columns of the data, so all that is left is reading, rendering, writing,
syncing and committing. Prints seconds, milliseconds a block and resident memory as it goes; asserts nothing. Such
values are not cached: what the cache adds to a block is measured by itself, beside `--cached` files of the model.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_score.config.load import load_config
from dpo_score.engine import prepare as preparing
from dpo_score.engine.context import RunContext
from dpo_score.engine.plan import RunPlan
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run_context, run_references
from dpo_score.storage.cache.cache import SequenceLogps, open_cache
from tests.tiny import byte_tokenizer


class Meter(Progress):
    """Prints a line every `every` blocks."""

    def __init__(self, every: int) -> None:
        super().__init__(quiet=True)
        self._every, self._blocks, self._since, self._own = every, 0, time.perf_counter(), psutil.Process()

    def rows(self, count: int) -> None:
        super().rows(count)
        self._blocks += 1
        if self._blocks % self._every == 0:
            self.line(f"{self._blocks:7,} blocks")

    def line(self, what: str) -> None:
        seconds, memory = time.perf_counter() - self._since, self._own.memory_info().rss / 2**20
        each = f"{1000 * seconds / self._blocks:6.2f} ms a block" if self._blocks else ""
        print(f"{what:20} {seconds:8.1f} s  {each:18}  {memory:7.1f} MiB resident", flush=True)


def write_pairs(path: Path, count: int) -> Path:
    """`count` short pairs with reference values beside them."""
    values = np.linspace(-90.0, -10.0, count)
    texts = {"prompt": [f"prompt {i}" for i in range(count)], "chosen": ["yes"] * count, "rejected": ["no"] * count}
    pq.write_table(pa.table({**texts, "ref_c": values, "ref_r": values - 1.0}), path)
    return path


def configuration(folder: Path, out: Path, blocks: int) -> Any:
    byte_tokenizer(chat_template=None).save_pretrained(folder / "tokenizer")
    options = {
        "data": [str(write_pairs(folder / "pairs.parquet", blocks))],
        "reference": "columns:ref_c,ref_r",
        "tokenizer": str(folder / "tokenizer"),
        "out": str(out),
        "cache_dir": str(folder / "cache"),
        "threads": 1,
    }
    return load_config(None, options, environment={})


def run_here(config: Any, meter: Meter) -> None:
    with run_context(config, meter, config.out) as context:
        _both_times(context, preparing.prepare(config, context)[0], meter)


def run_on_ray(config: Any, meter: Meter, workers: int) -> None:
    import ray

    from dpo_score.engine.executors.pool import WorkerPool
    from dpo_score.engine.executors.ray import Device, RayBackend

    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with run_context(config, meter, config.out) as context:
        plan, _ = preparing.prepare(config, context)
        with WorkerPool(RayBackend(ray, Device(1, 0, workers)), config, context) as pool:
            context = replace(context, workers=pool)
            _both_times(context, plan, meter)
    ray.shutdown()


def _both_times(context: RunContext, plan: RunPlan, meter: Meter) -> None:
    """All blocks, then a second look at all of them, as a resumed run takes it."""
    meter.line("begin")
    run_references(context, plan)
    meter.line("end")
    begun = time.perf_counter()
    run_references(context, plan)
    seconds = time.perf_counter() - begun
    print(f"a resumed run looks at them in {seconds:.1f} s, {1000 * seconds / len(list(plan.rows)):.2f} ms a block")


def count_files(out: Path) -> str:
    found = [path for path in out.rglob("*") if path.is_file()]
    records = [path for path in found if "commits" in path.parts]
    parts = [path for path in found if "reference" in path.parts and path.suffix == ".parquet"]
    mean = sum(path.stat().st_size for path in records) / max(len(records), 1)
    return f"{len(found):,} files, {len(parts):,} parts, {len(records):,} records of {mean:,.0f} bytes"


def cache_cost(folder: Path, files: int, blocks: int = 200) -> float:
    """Seconds of processor time to add a block of 64 short pairs to a cache that holds `files` files, beyond the first,
    for which they are listed. Nobody reads them, so they are empty."""
    space = open_cache(folder / "cache").namespace({"weights": "synthetic"})
    at = folder / "cache" / space.folder
    at.mkdir(parents=True)
    for number in range(files):
        (at / f"ref-{number:032x}.parquet").touch()
    entries = [
        {(128 * n + i).to_bytes(16, "big"): SequenceLogps(np.full(50, -1.0 - n, np.float32)) for i in range(128)}
        for n in range(blocks)
    ]
    space.add("ref", entries[0])
    began = time.process_time()
    for block in entries[1:]:
        space.add("ref", block)
    return (time.process_time() - began) / (blocks - 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=20_000)
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, help="a folder on the file system to be measured (default: a temporary one)"
    )
    parser.add_argument("--cached", type=int, default=40_000, help="files in the cache that blocks are added to")
    asked = parser.parse_args(arguments)
    preparing.block_rows = lambda *_: 1
    folder = Path(tempfile.mkdtemp(prefix="bench-blocks-"))
    out = asked.out or folder / "out"
    try:
        seconds = cache_cost(folder / "filled", asked.cached)
        print(f"a block into a cache of {asked.cached:,} files: {1000 * seconds:.1f} ms of processor time")
        if asked.blocks:
            run_blocks(asked, folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_blocks(asked: argparse.Namespace, folder: Path, out: Path) -> None:
    meter, config = Meter(max(asked.blocks // 10, 1)), configuration(folder, out, asked.blocks)
    if asked.engine == "ray":
        run_on_ray(config, meter, asked.workers)
    else:
        run_here(config, meter)
    print(count_files(out))


if __name__ == "__main__":
    main()
