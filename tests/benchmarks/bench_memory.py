"""Resident memory of `dpo-score run`: flat in rows, whatever the row groups, and flat while a long run goes on.

    python -m tests.benchmarks.bench_memory [ROWS_FEW ROWS_MANY]
    python -m tests.benchmarks.bench_memory --course 200000 [--engine ray]

Runs the real command line on a tiny model. The first: once with few rows, once with many, once with many in one row
group; prints the peak of each process tree and the ratios. The second: one run, and for every process of it the
resident memory when a tenth, a quarter, … of the blocks were committed. Not a test: it takes minutes.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
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


class Course:
    """Resident MiB of every process of a run, by how many blocks were committed then."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path) -> None:
        self.names: dict[int, str] = {}
        self.seen: dict[int, list[tuple[int, float]]] = defaultdict(list)
        while process.poll() is None:
            committed = len(list(out.glob("commits/**/*.json")))
            for pid in _tree(process.pid):
                if (size := _resident(pid)) > 0:
                    self.names[pid] = _name(pid)
                    self.seen[pid].append((committed, size))
            time.sleep(0.5)

    def print(self) -> None:
        blocks = max(committed for course in self.seen.values() for committed, _ in course)
        print(f"{'process':<24}" + "".join(f"{share:>9.0%}" for share in SHARES) + "   most after 10 % / by 10 %")
        for pid, course in sorted(self.seen.items(), key=lambda item: -item[1][-1][1]):
            begun = [size for committed, size in course if committed <= SHARES[0] * blocks]
            later = [size for committed, size in course if committed > SHARES[0] * blocks]
            if not begun or not later:
                continue  # it did not live through the run
            shown = [max(size for c, size in course if c <= share * blocks) for share in SHARES]
            print(f"{self.names[pid]:<24}{''.join(f'{x:9.0f}' for x in shown)}   {max(later) / max(begun):.3f}x")


def _name(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    return " ".join(Path(word).name for word in words[:3])[:22]


def command(root: Path, data: Path, label: str, *more: str) -> list[str]:
    words = ["run", "--data", data, "--out", root / f"out-{label}", "--cache-dir", root / f"cache-{label}"]
    words += ["--reference", root / "m0", "--policy", f"p={root / 'm1'}", "--compile", "off", "--quiet"]
    return [sys.executable, "-m", "dpo_score", *map(str, words), *more]


def main() -> None:
    from tests.tiny import save_tiny

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--course", type=int)
    parser.add_argument("--engine", default="local")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for seed in range(2):
            save_tiny(root / f"m{seed}", seed=seed)
        if asked.course:
            data = write_pairs(root / "pairs.parquet", asked.course, 1_000)
            process = subprocess.Popen(command(root, data, "course", "--engine", asked.engine))
            Course(process, root / "out-course").print()
            raise SystemExit(process.returncode)
        few, many = asked.rows
        peaks: list[float] = []
        for rows, group_rows, label in ((few, 1_000, "few"), (many, 1_000, "many"), (many, many, "many in one group")):
            data, started = write_pairs(root / f"{len(peaks)}.parquet", rows, group_rows), time.monotonic()
            peaks.append(peak_of(command(root, data, str(len(peaks))), dict(os.environ)))
            seconds, ratio = time.monotonic() - started, peaks[-1] / peaks[0]
            print(f"{label:<20} {rows:>8,} rows  {peaks[-1]:8.0f} MiB  {ratio:.3f}x  {seconds:.0f} s")


if __name__ == "__main__":
    main()
