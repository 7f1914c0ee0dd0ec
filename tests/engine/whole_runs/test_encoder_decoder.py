"""T5 and BART through the whole program: the labels that their tokenizer makes, scored as transformers scores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSeq2SeqLM

import dpo_score
from dpo_score.errors import ConfigError, ModelError
from tests.encoder_decoders import POSITIONS, SIZES, ending_tokenizer, labels_logps, own_logps, save_encoder_decoder
from tests.exported import export, read, text_rows, write_rows
from tests.tiny import tiny_model

BOUND = 1e-4


@pytest.fixture(scope="module", params=SIZES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder_decoder(tmp_path_factory.mktemp(request.param) / "m0", request.param)


def rows() -> list[dict[str, Any]]:
    return [{**row, "prompt": row["prompt"] + " "} for row in text_rows(8)]


def test_a_run_of_stage_one_agrees_with_transformers(model: Path, tmp_path: Path) -> None:
    given = rows()
    export(write_rows(tmp_path / "d.parquet", given), model, tmp_path / "out", to="ids")
    tokenizer = ending_tokenizer()
    for row, found in zip(given, read(tmp_path / "out").to_pylist(), strict=True):
        assert found["prompt_ids"] == tokenizer(row["prompt"]).input_ids
        for side in ("chosen", "rejected"):
            assert found[f"{side}_ids"] == tokenizer(text_target=row[side]).input_ids
            assert found[f"ref_{side}_logps"] == pytest.approx(own_logps(model, row["prompt"], row[side]), abs=BOUND)


def test_scores_of_both_stages_agree_with_transformers(model: Path, tmp_path: Path) -> None:
    kind = "bart" if "bart" in str(model) else "t5"
    policy = save_encoder_decoder(tmp_path / "policy", kind, seed=1)
    found = dpo_score.score(rows(), reference=model, policy=policy, cache_dir=tmp_path / "cache")
    for row, score in zip(rows(), found.to_dicts(), strict=True):
        for side in ("chosen", "rejected"):
            for role, folder in (("ref", model), ("policy", policy)):
                expected = own_logps(folder, row["prompt"], row[side])
                assert score[f"{role}_{side}_logps"] == pytest.approx(expected, abs=BOUND)


def test_a_loaded_model_scores_the_same(model: Path, tmp_path: Path) -> None:
    held = AutoModelForSeq2SeqLM.from_pretrained(model)
    how: dict[str, Any] = {"loss": "simpo", "cache_dir": tmp_path / "cache"}
    by_name, loaded = (dpo_score.score(rows(), policy=policy, **how) for policy in (model, held))
    for column in ("policy_chosen_logps", "policy_rejected_logps"):
        assert (by_name[column] - loaded[column]).abs().max() < BOUND


def test_prompt_and_answer_have_the_positions_of_their_own_side(tmp_path: Path) -> None:
    folder = save_encoder_decoder(tmp_path / "bart", "bart")
    full = POSITIONS - 1
    given = [
        {"prompt": "a" * full, "chosen": "b" * full, "rejected": "c"},
        {"prompt": "a" * (full + 1), "chosen": "b", "rejected": "c" * 99},
    ]
    export(write_rows(tmp_path / "d.parquet", given), folder, tmp_path / "out", to="ids")
    whole, cut = read(tmp_path / "out").to_pylist()
    assert [len(whole[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")] == [POSITIONS, POSITIONS, 2]
    assert [len(cut[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")] == [POSITIONS, 2, POSITIONS]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).double().eval()
    expected = labels_logps(model, cut["prompt_ids"], cut["rejected_ids"])
    assert cut["ref_rejected_logps"] == pytest.approx(expected, abs=BOUND)
    with pytest.raises(ConfigError, match="--max-length 65 is more than the model's own limits"):
        export(tmp_path / "d.parquet", folder, tmp_path / "other", to="ids", max_length=65)


def test_a_model_of_the_other_kind_is_refused(runner: Any, tmp_path: Path) -> None:
    """One text makes other tokens for it, so its log-probs would be of something else."""
    reference = save_encoder_decoder(tmp_path / "t5", "t5")
    tiny_model(seed=3).save_pretrained(tmp_path / "llama")
    data = write_rows(tmp_path / "d.parquet", rows())
    found = runner(data, tmp_path / "out", reference=str(reference), policy=[f"p={tmp_path / 'llama'}"])
    assert "is not an encoder-decoder, unlike the model" in found.failures["p"]
    with pytest.raises(ModelError, match="is an encoder-decoder, unlike the model"):
        dpo_score.score(rows(), reference=tmp_path / "llama", policy=reference, tokenizer=reference)


def test_what_becomes_of_the_rows_is_said(runner: Any, tmp_path: Path) -> None:
    reference = save_encoder_decoder(tmp_path / "t5", "t5")
    data = write_rows(tmp_path / "d.parquet", rows())
    found = runner(data, tmp_path / "out", reference=str(reference), policy=[f"p={reference}"])
    assert found.summary["text"]["render"].startswith("prompts go to the encoder and answers to the decoder")
    assert set(found.summary["policies"]["p"]["overall"]) >= {"scored"}


def test_a_benchmark_of_causal_models_is_refused(runner: Any, tmp_path: Path) -> None:
    reference = save_encoder_decoder(tmp_path / "t5", "t5")
    data = write_rows(tmp_path / "d.parquet", rows())
    with pytest.raises(ConfigError, match="scores causal models"):
        runner(data, tmp_path / "out", reference=str(reference), policy=[f"p={reference}"], rewardbench="exact")
