"""A real Trainer of two steps: the logged metrics are those of `score`, and the training is none the wiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import Trainer, TrainingArguments

import dpo_score
from dpo_score.errors import ConfigError
from dpo_score.integrations.callback import PreferenceMetrics, measured
from tests.tiny import byte_tokenizer, save_tiny, tiny_model

GOOD, BAD = " a good answer", " a bad one"
PAIRS = [
    *({"prompt": f"question {i}", "chosen": GOOD[: 4 + i], "rejected": BAD[: 3 + i]} for i in range(6)),
    {"prompt": "broken", "chosen": None, "rejected": BAD},
]


def examples(count: int) -> list[dict[str, list[int]]]:
    ids = list(range(40, 56))
    return [{"input_ids": ids, "labels": ids} for _ in range(count)]


def trainer(folder: Path, **options: Any) -> Trainer:
    torch.set_num_threads(1)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
        **options,
    )
    model = tiny_model(seed=1)
    return Trainer(
        model, arguments, train_dataset=examples(4), eval_dataset=examples(2), processing_class=byte_tokenizer()
    )


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DPO_SCORE_CACHE_DIR", str(tmp_path / "cache"))
    return str(save_tiny(tmp_path / "reference", seed=0))


def test_each_evaluation_logs_what_score_says(tmp_path: Path, reference: str) -> None:
    made = trainer(tmp_path)
    callback = PreferenceMetrics.attach(made, PAIRS, reference=reference, beta=0.5)
    before = callback.measure()
    made.train()
    logged = [entry for entry in made.state.log_history if "eval_pairs/accuracy" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    frame = dpo_score.score(PAIRS, policy=made.model, reference=reference, tokenizer=byte_tokenizer(), beta=0.5)
    assert logged[-1]["eval_pairs/margins"] == pytest.approx(frame["margins"].mean(), abs=1e-6)
    assert logged[-1]["eval_pairs/loss"] == pytest.approx(frame["loss"].mean(), abs=1e-6)
    assert logged[-1]["eval_pairs/margins"] != before["margins"]
    assert (logged[-1]["eval_pairs/scored"], logged[-1]["eval_pairs/rejected"]) == (6, 1)


def test_training_goes_on_as_without_it(tmp_path: Path, reference: str) -> None:
    losses = []
    for attached in (False, True):
        made = trainer(tmp_path, logging_steps=1)
        if attached:
            PreferenceMetrics.attach(made, PAIRS, reference=reference)
        made.train()
        losses.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
        weights = torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])
        losses[-1].append(float(weights.double().sum()))
    assert losses[0] == losses[1]


def test_a_metric_is_part_of_the_evaluation_and_can_choose_the_best_model(tmp_path: Path, reference: str) -> None:
    made = trainer(tmp_path)
    PreferenceMetrics.attach(made, PAIRS, reference=reference, name="dpo")
    assert {"eval_loss", "eval_dpo/accuracy", "eval_dpo/chosen_rewards"} <= made.evaluate().keys()


def test_a_sharded_model_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.is_fsdp_enabled = True
    with pytest.raises(ConfigError, match="sharded over processes; score its checkpoints instead"):
        PreferenceMetrics(made, PAIRS)


def test_a_metric_without_a_value_is_left_out() -> None:
    empty = {"status": ["null_field"], "loss": [None], "accuracy": [None], "margins": [None]}
    assert measured(pl.DataFrame(empty)) == {"scored": 0.0, "rejected": 1.0}
