"""Tiny models, tokenizers and preference files for whole runs; made once a session."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_score.config.load import load_config
from dpo_score.engine.progress import Progress
from tests.tiny import save_tiny

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "box")


def sentence(draw: random.Random, longest: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, longest)))


def preference_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Different prompts, answers of 1-20 words, two subsets."""
    draw = random.Random(seed)
    return [
        {
            "prompt": f"{i} {sentence(draw, 12)}",
            "chosen": " " + sentence(draw, 20),
            "rejected": " " + sentence(draw, 20),
            "subset": draw.choice("ab"),
        }
        for i in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]], **how: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **how)
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """`reference`, `better` and `worse`: three random Llamas with one tokenizer."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, seed=seed) for seed, name in enumerate(("reference", "better", "worse"))}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class Runner:
    """`runner(out, **options)` runs one job quietly; `forwards` counts the model passes of the last one."""

    def __init__(self, cache: Path, models: Mapping[str, Path]) -> None:
        self.cache, self.models, self.forwards = cache, models, 0

    def config(self, data: Path, out: Path | None, **options: Any) -> Any:
        given = {"data": [str(data)], "cache_dir": str(self.cache), "threads": 1, **options}
        if out is not None:
            given["out"] = str(out)
        given.setdefault("reference", str(self.models["reference"]))
        given.setdefault("policy", [f"better={self.models['better']}"])
        return load_config(None, {k: v for k, v in given.items() if v is not None}, environment={})

    def __call__(self, data: Path, out: Path, restart: bool = False, **options: Any) -> Any:
        from dpo_score.engine.run import run

        return run(self.config(data, out, **options), Progress(quiet=True), restart=restart)


@pytest.fixture
def runner(cache: Path, models: Mapping[str, Path]) -> Runner:
    return Runner(cache, models)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of every call that reached a model."""
    from dpo_score.logprobs import scorer

    seen: list[int] = []
    true_score = scorer.PairScorer.score

    def counted(self: Any, sequences: Any) -> Any:
        seen.append(len(sequences))
        return true_score(self, sequences)

    monkeypatch.setattr(scorer.PairScorer, "score", counted)
    return seen
