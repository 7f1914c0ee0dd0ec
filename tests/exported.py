"""Small data sets with reference log-probs, written by `precompute` from tiny models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_score.config.load import load_config
from dpo_score.engine.progress import Progress
from dpo_score.export.precompute import PrecomputeOutcome, precompute

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box"]


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Explicit pairs of a few words, with a column of another kind beside them."""
    draw = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))

    return [
        {"prompt": words(5), "chosen": " " + words(6), "rejected": " " + words(6), "subset": "ab"[i % 2], "n": i}
        for i in range(count)
    ]


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same as conversations."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in text_rows(count, seed)
    ]


def hh_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Transcripts whose answers begin with the same words: TRL's split and the marker's differ on them."""
    return [
        {
            "chosen": f"\n\nHuman: {row['prompt']}\n\nAssistant: the{row['chosen']}",
            "rejected": f"\n\nHuman: {row['prompt']}\n\nAssistant: the{row['rejected']} no",
        }
        for row in text_rows(count, seed)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def export(
    data: Path | list[str],
    reference: Path,
    out: Path | None,
    to: str = "trl",
    rename: str | None = None,
    **options: Any,
) -> PrecomputeOutcome:
    """`dpo-score precompute` with a cache of its own beside `out` (or `reference`), on the plain path."""
    settings = {
        "data": data if isinstance(data, list) else [str(data)],
        "reference": str(reference),
        "path": "plain",
        "cache_dir": str(Path(out or reference).parent / "cache"),
        "threads": 1,
        **({"out": str(out)} if out else {}),
        **options,
    }
    restart = bool(settings.pop("restart", False))
    return precompute(load_config(None, settings, {}), Progress(quiet=True), restart=restart, to=to, rename=rename)


def read(out: Path, split: str = "train") -> pa.Table:
    """All files of a split, in order."""
    return pa.concat_tables(pq.read_table(path) for path in sorted((out / "data").glob(f"{split}-*.parquet")))
