"""What the end of a run holds in memory: the summary of one policy, a row at a time read and kept as numbers.

    python -m tests.benchmarks.bench_summary                    one and three million rows
    python -m tests.benchmarks.bench_summary 1000000 8000000

Synthetic score tables, each in a process of its own; peak resident memory of both, and what they differ by for each
row. Prints; asserts nothing.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from dpo_score.metrics.arrays import FLOATS, TOKENS
from dpo_score.metrics.summary import summarise

PART = 1024


def parts(rows: int) -> Iterator[pa.Table]:
    """Score tables of PART rows: every prompt another one, two subsets."""
    draw = np.random.default_rng(0)
    for start in range(0, rows, PART):
        size = min(PART, rows - start)
        found = {name: draw.normal(-50.0, 10.0, size) for name in FLOATS}
        found |= {name: draw.integers(1, 200, size) for name in TOKENS}
        found |= {"row_id": [f"0:{row}" for row in range(start, start + size)], "dataset": ["pairs"] * size}
        found |= {"subset": [f"s{row % 2}" for row in range(size)], "status": ["ok"] * size}
        found |= {"pair_id": [f"{row:032x}" for row in range(start, start + size)]}
        found |= {"prompt_digest": [f"{row:032x}" for row in range(start, start + size)]}
        found |= {name: np.zeros(size, bool) for name in ("chosen_truncated", "rejected_truncated")}
        yield pa.table(found)


def peak(rows: int) -> tuple[float, float]:
    """MiB resident at most, and seconds, of a process that summarises `rows` rows."""
    words = [sys.executable, "-m", "tests.benchmarks.bench_summary", "--alone", str(rows)]
    memory, seconds = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    return float(memory), float(seconds)


def alone(rows: int) -> None:
    begun = time.perf_counter()
    assert summarise(parts(rows))["overall"]["n"] == rows
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter() - begun)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--alone"]:
        alone(int(arguments[1]))
        return
    few, many = map(int, arguments or ["1000000", "3000000"])
    found = {rows: peak(rows) for rows in (few, many)}
    for rows, (memory, seconds) in found.items():
        print(f"{rows:12,} rows {memory:9.0f} MiB at most {seconds:8.1f} s")
    each = (found[many][0] - found[few][0]) * 2**20 / (many - few)
    print(f"{each:.0f} bytes a row, {(found[many][1] - found[few][1]) / (many - few) * 1e6:.1f} µs a row")


if __name__ == "__main__":
    main(sys.argv[1:])
