"""Reference log-probs equal those of TRL's own reference pass, on the same token ids, on every row that both score."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_score.models.resolve import resolve
from dpo_score.storage.file_hashes import FileDigests
from tests.exported import export, write_rows
from tests.parity.trl_reference import SMOL, Agreement, agreement, rows_of, trl_pass
from tests.tiny import save_tiny

pytest.importorskip("trl")
pytest.importorskip("datasets")


def tiny_agreement(name: str, chat: bool, max_length: int | None, work: Path, step: int = 1) -> Agreement:
    rows = sorted(rows_of(name, chat), key=lambda row: len(str(row)))[::step]  # by length: TRL pads each batch
    model = save_tiny(work / "model", seed=0, num_hidden_layers=1, max_position_embeddings=32768)
    data = write_rows(work / "d.parquet", rows)
    export(data, model, work / "out", emit_ids=True, prompt_split="trl", max_length=max_length)
    found = agreement(rows, work / "out", trl_pass(rows, model, work / "trl", max_length))
    print(name, "chat" if chat else "raw", f"max_length={max_length}", found)
    return found


def test_rows_that_are_cut_on_a_tiny_model(tmp_path: Path) -> None:
    found = tiny_agreement("llmbar", False, 256, tmp_path)
    assert (found.only_ours, found.only_theirs) == ([], [])
    assert found.both > 200
    assert found.excess <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "chat", "rows"),
    [("llmbar", False, 70), ("llmbar", True, 70), ("hh_harmless_600", False, 100)],
    ids=["llmbar raw", "llmbar chat", "hh"],
)
def test_every_sixth_row_on_a_tiny_model(name: str, chat: bool, rows: int, tmp_path: Path) -> None:
    """`python -m tests.parity.tables trl` takes every row, and the real model."""
    found = tiny_agreement(name, chat, None, tmp_path, step=6)
    assert (found.both, found.only_ours, len(found.only_theirs)) == (rows, [], 0)
    assert found.excess <= 1.0


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the real model in it, read from its GGUF file once for all tests here."""
    pytest.importorskip("gguf")
    cache = Path(os.environ.get("DPO_SCORE_CACHE_DIR") or tmp_path_factory.mktemp("cache"))
    resolve(SMOL, cache_dir=cache, sha256=FileDigests(cache).sha256)
    return cache


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chat"), [("llmbar", True), ("hh_harmless_600", False)], ids=["llmbar chat", "hh"])
def test_a_real_model_on_real_data(name: str, chat: bool, converted: Path, tmp_path: Path) -> None:
    rows = sorted(rows_of(name, chat), key=lambda row: len(str(row)))[:160:32]
    folder = resolve(SMOL, cache_dir=converted, sha256=FileDigests(converted).sha256).folder
    data = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist(rows), data)
    options = {"emit_ids": True, "prompt_split": "trl", "path": "auto", "cache_dir": str(converted), "threads": None}
    export(data, SMOL, tmp_path / "out", **options)
    found = agreement(rows, tmp_path / "out", trl_pass(rows, folder, tmp_path / "trl", None))
    print(name, chat, found)
    assert (found.both, found.only_ours) == (len(rows) - len(found.only_theirs), [])
    assert found.excess <= 1.0
