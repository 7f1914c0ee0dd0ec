"""Peak memory of `dpo-score run` for few and many rows: flat in rows, whatever the row groups.

    python -m tests.benchmarks.bench_memory [ROWS_FEW ROWS_MANY]

Runs the real command line on a tiny model, once with few rows, once with many, once with many in one row group,
and prints the peak resident memory of each process tree and the ratios. Not a test: it takes minutes.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ("red", "blue", "green", "grey", "pink", "gold", "teal", "plum")


def write_pairs(path: Path, rows: int, group_rows: int) -> Path:
    """Short prompts and answers, all different."""
    draw = random.Random(0)
    schema = pa.schema([("prompt", pa.string()), ("chosen", pa.string()), ("rejected", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, group_rows):
            chunk = [
                {"prompt": f"{i} ", "chosen": _words(draw), "rejected": _words(draw)}
                for i in range(start, min(start + group_rows, rows))
            ]
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema), row_group_size=group_rows)
    return path


def _words(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 4)))


def peak_of(command: list[str], environment: dict[str, str]) -> float:
    """Peak resident MiB of a process and its children, sampled every 50 ms."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peak = [0.0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    code = process.wait()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return peak[0]


def _watch(process: subprocess.Popen[bytes], peak: list[float]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(_resident(pid) for pid in _tree(process.pid)))
        time.sleep(0.05)


def _tree(root: int) -> list[int]:
    found = [root]
    for pid in found:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        if children.exists():
            found += [int(child) for child in children.read_text().split()]
    return found


def _resident(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def main() -> None:
    from tests.tiny import save_tiny

    few, many = (int(n) for n in sys.argv[1:3]) if len(sys.argv) > 2 else (10_000, 100_000)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = [save_tiny(root / f"m{seed}", seed=seed) for seed in range(2)]
        environment = {**os.environ, "DPO_SCORE_CACHE_DIR": str(root / "cache")}
        cases = ((few, 1_000, "few"), (many, 1_000, "many"), (many, many, "many, one row group"))
        peaks = []
        for rows, group_rows, label in cases:
            data = write_pairs(root / f"{len(peaks)}.parquet", rows, group_rows)
            command = [
                sys.executable,
                "-m",
                "dpo_score",
                "run",
                "--data",
                str(data),
                "--out",
                str(root / f"o{len(peaks)}"),
            ]
            command += ["--reference", str(models[0]), "--policy", f"p={models[1]}", "--compile", "off", "--quiet"]
            started = time.monotonic()
            peaks.append(peak_of([*command, "--cache-dir", str(root / f"c{len(peaks)}")], environment))
            seconds, ratio = time.monotonic() - started, peaks[-1] / peaks[0]
            print(f"{label:<20} {rows:>8,} rows  {peaks[-1]:8.0f} MiB  {ratio:.3f}x  {seconds:.0f} s")


if __name__ == "__main__":
    main()
