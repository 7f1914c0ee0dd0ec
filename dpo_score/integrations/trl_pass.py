"""Reference log-probabilities by TRL's own code: its tokenisation, its cut, its batches, its reference pass.

Promises: rows go in as prompt, chosen and rejected, as `precompute` writes them, and come back as the installed
DPOTrainer holds them before its first step: token ids and sums, float32 without autocast. Nothing of this project's
rendering, planning or scoring takes part. Does not: load a model (the caller's goes in), train, or report anywhere.
"""

from __future__ import annotations

import logging as messages
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers.utils import logging

from dpo_score.config.schema import TextSpec
from dpo_score.data.types import Pair
from dpo_score.export.layout import built_columns, columns_to_build, survey
from dpo_score.integrations.load_ref_logps import cut

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
VALUES = ("ref_chosen_logps", "ref_rejected_logps")
BATCH = 8
"""Rows that TRL pads and scores together."""


@dataclass(frozen=True, slots=True)
class TrlRow:
    """What TRL made of a pair. `ids`: prompt, chosen, rejected after its cut; `values`: their sums, nats."""

    ids: list[list[int]]
    values: tuple[float, float]


def reference_pass(
    pairs: Sequence[Pair], model: Any, tokenizer: Any, text: TextSpec, max_length: int | None
) -> dict[str, TrlRow]:
    """row_id → what TRL makes of it; a row that TRL drops is absent. `pairs`: as scored, with explicit prompts."""
    found: dict[str, TrlRow] = {}
    for chat in (False, True):  # TRL decides by the first row of a set
        kind = [pair for pair in pairs if pair.is_conversation is chat]
        if kind:
            found |= _pass(kind, model, tokenizer, text, max_length)
    return found


def _pass(
    pairs: Sequence[Pair], model: Any, tokenizer: Any, text: TextSpec, max_length: int | None
) -> dict[str, TrlRow]:
    with tempfile.TemporaryDirectory(prefix="dpo-score-") as folder, _quiet():
        from datasets import Dataset
        from trl import DPOTrainer

        pq.write_table(_table(pairs, text), Path(folder) / "rows.parquet")
        rows = Dataset.from_parquet(str(Path(folder) / "rows.parquet"), cache_dir=folder)
        settings = _settings(folder, max_length)
        made = DPOTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer).train_dataset
        return {
            row["row_id"]: TrlRow(
                cut([row[name] for name in IDS], max_length), (float(row[VALUES[0]]), float(row[VALUES[1]]))
            )
            for row in made
        }


def _table(pairs: Sequence[Pair], text: TextSpec) -> pa.Table:
    plan = columns_to_build(survey([(pairs, pa.table({}))], text), pa.schema([]))
    ids = pa.array([pair.source.row_id for pair in pairs], pa.string())
    return pa.table({"row_id": ids, **built_columns(plan, pairs, text)})


def _settings(folder: str, max_length: int | None) -> Any:
    from trl import DPOConfig

    return DPOConfig(
        folder,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        max_length=max_length,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=BATCH,
        report_to="none",
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no notices of the libraries, which are put back as they were."""
    import datasets

    messages.getLogger("bitsandbytes").setLevel(messages.ERROR)  # TRL imports it where it is installed
    before, level = os.environ.get("TQDM_DISABLE"), logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled()
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of TRL's calls into transformers
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
        del os.environ["TQDM_DISABLE"]
        if before is not None:
            os.environ["TQDM_DISABLE"] = before
