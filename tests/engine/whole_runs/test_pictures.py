"""Whole runs on pairs about pictures: resume, changed pictures, adapters on text and tower, TRL's trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from dpo_score import precompute, run, score
from dpo_score.data.types import TokenSequence
from dpo_score.errors import IdentityError, ModelError
from dpo_score.logprobs.pictures import PromptStates, SharedPictures
from tests.tiny import save_tiny
from tests.vision import encoded, picture, save_vision, write_pairs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_vision(folder / "base", "llava")
    save_vision(folder / "other", "llava", seed=1)
    model = AutoModelForImageTextToText.from_pretrained(folder / "base")
    modules = r".*(language_model|vision_tower).*\.(q_proj|v_proj)"
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    tuned.save_pretrained(folder / "adapter")
    return folder


def pairs(path: Path, count: int = 4) -> Path:
    return write_pairs(path, [[encoded(picture(i))] if i != 1 else [] for i in range(count)])


def scored(out: Path, policy: str = "p") -> list[dict[str, Any]]:
    return [
        row for part in sorted((out / "scores" / policy).glob("*.parquet")) for row in pq.read_table(part).to_pylist()
    ]


def test_an_adapter_on_text_and_tower_is_scored_as_peft_scores_it(models: Path, tmp_path: Path) -> None:
    data, base = pairs(tmp_path / "pairs.parquet"), str(models / "base")
    options = {"out": tmp_path / "out", "cache_dir": str(tmp_path / "cache"), "dtype": "float32"}
    run(data=data, reference=base, policy={"p": f"{base}+{models / 'adapter'}"}, **options)
    bare = AutoModelForImageTextToText.from_pretrained(base)
    from peft import PeftModel

    tuned = PeftModel.from_pretrained(bare, models / "adapter").eval()
    processor = AutoProcessor.from_pretrained(base)
    again = score(str(data), policy=tuned, reference="base", tokenizer=processor)
    for ours, theirs in zip(scored(tmp_path / "out"), again.to_dicts(), strict=True):
        assert abs(ours["margins_nats"] - theirs["margins_nats"]) < 1e-3
        assert abs(ours["margins_nats"]) > 1e-3


def test_a_policy_behind_the_same_tower_takes_what_the_reference_made_of_the_pictures(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter on the text alone leaves the tower as it is; the values are those of a run that keeps nothing."""
    passes: list[int] = []

    def counted(self: SharedPictures, sequence: TokenSequence) -> PromptStates:
        before = self.prompts_seen
        found = states(self, sequence)
        passes.append(self.prompts_seen - before)
        return found

    states = SharedPictures.prompt_states
    model = AutoModelForImageTextToText.from_pretrained(models / "base")
    lora = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "text")
    data, base = pairs(tmp_path / "pairs.parquet", 6), str(models / "base")
    policies = {"text": f"{base}+{tmp_path / 'text'}", "both": f"{base}+{models / 'adapter'}"}
    options: dict[str, Any] = {"data": data, "reference": base, "policy": policies, "dtype": "float32"}
    monkeypatch.setattr(SharedPictures, "prompt_states", counted)
    kept = run(**options, out=tmp_path / "kept", cache_dir=str(tmp_path / "c2"))
    with_kept, passes[:] = list(passes), []
    monkeypatch.setattr("dpo_score.engine.prepare.kept_bytes", lambda: 0)
    alone = run(**options, out=tmp_path / "alone", cache_dir=str(tmp_path / "c3"))
    assert sum(passes) == len(passes) == len(with_kept)
    assert sum(with_kept) <= len(with_kept) - 5  # of 5 pictures, for one of two policies
    assert kept.scores("text").equals(alone.scores("text"))
    assert kept.scores("both").equals(alone.scores("both"))


def test_a_changed_picture_is_another_request_and_the_cache_does_not_answer_for_it(
    models: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").write_bytes(encoded(picture(0)))
    row = {"image": "a.png", "question": "What?", "chosen": "A cat.", "rejected": "A dog."}
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps(row) + "\n")
    options: dict[str, Any] = {"reference": str(models / "base"), "policy": {"p": str(models / "other")}}
    options |= {"media_root": str(root), "cache_dir": str(tmp_path / "cache")}
    run(data=data, out=tmp_path / "one", **options)
    run(data=data, out=tmp_path / "one", **options)
    (root / "a.png").write_bytes(encoded(picture(1)))
    with pytest.raises(IdentityError, match="pictures"):
        run(data=data, out=tmp_path / "one", **options)
    run(data=data, out=tmp_path / "two", **options)
    before, after = scored(tmp_path / "one")[0], scored(tmp_path / "two")[0]
    assert before["policy_chosen_logps"] != after["policy_chosen_logps"]
    assert before["pair_id"] != after["pair_id"]


def test_a_model_of_texts_is_refused_for_pictures(tmp_path: Path) -> None:
    data, text = pairs(tmp_path / "pairs.parquet"), save_tiny(tmp_path / "text")
    with pytest.raises(ModelError, match=r"the data have pictures, and no processor can be loaded from"):
        run(data=data, reference=str(text), policy={"p": str(text)}, out=tmp_path / "out")


def test_trl_takes_a_step_on_reference_values_of_pictures(models: Path, tmp_path: Path) -> None:
    from trl import DPOConfig

    from dpo_score.integrations.trl import DPOTrainerWithRefLogps, load

    data, base = pairs(tmp_path / "pairs.parquet"), str(models / "base")
    out, cache = tmp_path / "out", str(tmp_path / "cache")
    precompute(data=data, reference=base, out=out, cache_dir=cache, prompt_split="trl", max_length=512)
    model, rows = (
        AutoModelForImageTextToText.from_pretrained(base),
        load(out, cache_dir=str(tmp_path / "datasets"))["train"],
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4, "max_length": 512, "use_cpu": True}
    settings |= {"report_to": [], "bf16": False, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}
    args = DPOConfig(output_dir=str(tmp_path / "trained"), **settings)
    given = {"processing_class": AutoProcessor.from_pretrained(base), "contract": out}
    trainer = DPOTrainerWithRefLogps(model, args=args, train_dataset=rows, **given)
    trainer.train()
    first = trainer.state.log_history[0]
    assert abs(first["rewards/chosen"]) < 1e-4
    assert trainer._is_reference  # so that the trainer itself compares its first rewards with 0
    assert any((before[name] != value).any() for name, value in model.state_dict().items())
    other = AutoModelForImageTextToText.from_pretrained(models / "other")
    assert not DPOTrainerWithRefLogps(other, args=args, train_dataset=rows, **given)._is_reference
    wrong = rows.map(lambda row: {**row, "pair_digest": "0" * 32})
    with pytest.raises(ValueError, match="are not those that were scored"):
        DPOTrainerWithRefLogps(model, args=args, train_dataset=wrong, **given).train()


def test_the_report_shows_small_pictures_and_leaves_them_out_when_asked(models: Path, tmp_path: Path) -> None:
    from dpo_score.report.build import report

    data, out = pairs(tmp_path / "pairs.parquet"), tmp_path / "out"
    options = {"reference": str(models / "base"), "policy": {"p": str(models / "other")}}
    run(data=data, out=out, cache_dir=str(tmp_path / "cache"), **options)
    page = (out / "report.html").read_text()
    worst = [row for row in scored(out) if row["margins"] < 0 and row["row_id"] != "0:1"]
    assert page.count('<img src="data:image/jpeg;base64,') >= min(len(worst), 1)
    assert ("img-src data:" in page) == bool(worst)
    report(str(out), no_text=True)
    bare = (out / "report.html").read_text()
    assert "data:image" not in bare
    assert "img-src" not in bare
