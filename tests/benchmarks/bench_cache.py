"""The cache at size: `python -m tests.benchmarks.bench_cache 100000000 [FOLDER]`.

Fills a cache with synthetic entries (two tokens each), compacts its index, looks 10⁴ random keys up, and prints
seconds and resident memory of each step. Prints, judges nothing.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpo_score.storage.cache.blocks import LOGPS, EntryBlock
from dpo_score.storage.cache.cache import CacheSpace, open_cache

TOKENS = 2
BLOCK_ENTRIES = 250_000
LOOKUPS = 10_000


def rss() -> int:
    """Resident memory of this process in bytes."""
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


def key_bytes(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """16 bytes per entry number, spread like a hash (two rounds of a 64-bit mixer)."""
    words = np.stack([_mixed(numbers.astype(np.uint64), salt) for salt in (1, 2)], axis=1)
    return words.view(np.uint8).reshape(len(numbers), 16)


def _mixed(x: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    x = x + np.uint64(salt * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def logps(numbers: NDArray[np.int64]) -> NDArray[np.float32]:
    """The values of each entry, (entries, TOKENS), derived from its number."""
    return -(numbers[:, None] % 1000 + np.arange(TOKENS)).astype(np.float32) / 64


def fill(space: CacheSpace, entries: int) -> None:
    for start in range(0, entries, BLOCK_ENTRIES):
        numbers = np.arange(start, min(start + BLOCK_ENTRIES, entries))
        offsets = np.arange(len(numbers) + 1) * TOKENS
        values = {LOGPS: np.ascontiguousarray(logps(numbers)).reshape(-1)}
        block = EntryBlock(key_bytes(numbers), offsets, values, {LOGPS: np.ones(len(numbers), bool)})
        space.add_block(f"synthetic-{start}", block)


def report(step: str, began: float) -> None:
    print(f"{step:<28}{time.perf_counter() - began:>9.2f} s   resident {rss() / 2**20:>7.0f} MiB", flush=True)


def main(entries: int, folder: str) -> None:
    space = open_cache(folder).namespace({"weights": "synthetic"})
    report("start", time.perf_counter())
    began = time.perf_counter()
    fill(space, entries)
    report(f"fill {entries:,}", began)
    began = time.perf_counter()
    space.compact()
    report("compact", began)
    began = time.perf_counter()
    view = space.view(space.snapshot())
    report("open a view", began)
    for name, chosen in _chosen(entries).items():
        began = time.perf_counter()
        found = view.lookup([key.tobytes() for key in key_bytes(chosen)])
        report(f"{len(chosen):,} {name}", began)
        expected = logps(chosen)
        assert all(
            (found[k.tobytes()].token_logps == v).all() for k, v in zip(key_bytes(chosen), expected, strict=True)
        )
    misses = key_bytes(np.arange(LOOKUPS) + 2 * entries)
    began = time.perf_counter()
    assert view.lookup([key.tobytes() for key in misses]) == {}
    report(f"{LOOKUPS:,} misses", began)


def _chosen(entries: int) -> dict[str, NDArray[np.int64]]:
    count = min(LOOKUPS, entries)
    start = (entries - count) // 2
    random = np.random.default_rng(0).integers(0, entries, count)
    return {"lookups in row order": np.arange(start, start + count), "lookups at random": np.unique(random)}


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    if len(sys.argv) > 2:
        main(size, sys.argv[2])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(size, temporary)
