"""One small real run, made once a test session: 40 pairs, a reference and three checkpoints of two layers."""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dpo_score.config.load import load_config
from dpo_score.engine import run as local
from dpo_score.engine.progress import Progress
from tests.tiny import save_tiny

HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box"]


@dataclass(frozen=True)
class SmallRun:
    """Row 5 is rejected, row 7 holds identical answers, row 9 hostile text; policies step-10, step-20, step-30."""

    folder: Path
    data: Path
    out: Path


@cache
def small_run(per_token: bool = True) -> SmallRun:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="small-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for index in range(4):
        save_tiny(folder / f"model{index}", seed=index)
    data = folder / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(_rows()), data)
    options = {
        "data": [str(data)],
        "reference": str(folder / "model0"),
        "policy": [f"step-{10 * index}={folder / f'model{index}'}" for index in (1, 2, 3)],
        "out": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
        "path": "plain",
        "per_token": per_token,
    }
    local.run(load_config(None, options, environment={}), Progress(quiet=True))
    return SmallRun(folder, data, folder / "out")


def _rows() -> list[dict[str, str | None]]:
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, words)))

    rows: list[dict[str, str | None]] = [
        {"prompt": text(6), "chosen": f" {text(8)}", "rejected": f" {text(8)}", "subset": draw.choice("ab")}
        for _ in range(40)
    ]
    rows[5]["chosen"] = None
    rows[7]["rejected"] = rows[7]["chosen"]
    rows[9]["chosen"] = f" {HOSTILE}"
    return rows
