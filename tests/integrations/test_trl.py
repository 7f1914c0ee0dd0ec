"""The trainer that uses our reference log-probs: it gets our numbers, and refuses all that they do not belong to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from dpo_score.api import score
from dpo_score.errors import ConfigError
from dpo_score.integrations.trl import DPOTrainerWithRefLogps, load
from tests.exported import chat_rows, export, hh_rows, text_rows, write_rows
from tests.tiny import save_tiny

ROWS = 12
BETA = 0.1


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save_tiny(folder / f"m{seed}", seed=seed)
    return folder


@pytest.fixture(scope="module")
def text_set(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Explicit strings, one row without a chosen answer."""
    folder = tmp_path_factory.mktemp("text")
    rows = text_rows(ROWS)
    rows[0]["chosen"] = None
    export(write_rows(folder / "d.parquet", rows), models / "m0", folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def chat_set(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    export(write_rows(folder / "d.parquet", chat_rows(ROWS)), models / "m0", folder / "out")
    return folder / "out"


def loaded(folder: Path, split: str = "train") -> Dataset:
    return load_dataset(str(folder), split=split, cache_dir=str(folder.parent / "hf"))


def config(folder: Path, **options: Any) -> DPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "bf16": False,
        "use_cpu": True,
        "max_length": None,
        "beta": BETA,
        "max_steps": 1,
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
    }
    return DPOConfig(**{**settings, **options})


def trainer(model: Path | Any, data: Path, work: Path, dataset: Any = None, **named: Any) -> DPOTrainerWithRefLogps:
    options = {name: named.pop(name) for name in list(named) if name in DPOConfig.__dataclass_fields__}
    path = named.pop("tokenizer_of", model)
    named.setdefault("processing_class", AutoTokenizer.from_pretrained(path))
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) if isinstance(model, Path) else model
    train = loaded(data) if dataset is None else dataset
    return DPOTrainerWithRefLogps(
        policy, args=config(work, **options), train_dataset=train, contract=named.pop("contract", data), **named
    )


def first_log(made: DPOTrainerWithRefLogps) -> dict[str, float]:
    made.train()
    return made.state.log_history[0]


# --- it uses our numbers -------------------------------------------------------------------------------------------


def test_at_the_reference_every_reward_is_zero(text_set: Path, models: Path, tmp_path: Path) -> None:
    made = trainer(models / "m0", text_set, tmp_path)
    found = first_log(made)
    assert made.ref_model is None
    assert abs(found["rewards/chosen"]) <= 1e-5
    assert abs(found["rewards/margins"]) <= 1e-5


@pytest.mark.parametrize("kind", ["text_set", "chat_set"])
def test_a_perturbed_policy_logs_the_rewards_that_we_compute(
    kind: str, models: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data = request.getfixturevalue(kind)
    found = first_log(trainer(models / "m1", data, tmp_path))
    rows = (text_rows(ROWS) if kind == "text_set" else chat_rows(ROWS))[1 if kind == "text_set" else 0 :]
    ours = score(rows, reference=models / "m0", policy=models / "m1", beta=BETA, path="plain", cache_dir=tmp_path)
    for name, column in (("chosen", "chosen_rewards"), ("rejected", "rejected_rewards"), ("margins", "margins")):
        assert found[f"rewards/{name}"] == pytest.approx(ours[column].mean(), abs=1e-5, rel=1e-6)


def test_rows_without_values_are_left_out_and_counted_once(
    text_set: Path, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="dpo_score"):
        made = trainer(models / "m0", text_set, tmp_path)
    lines = [r.getMessage() for r in caplog.records if r.name == "dpo_score"]
    assert lines == [f"train: 1 of {ROWS} rows have no reference log-probs and are left out"]
    assert len(made.train_dataset) == ROWS - 1


def test_eval_sets_by_name(text_set: Path, models: Path, tmp_path: Path) -> None:
    train = loaded(text_set)
    evals = {"first": train.select(range(6)), "second": train.select(range(6, ROWS))}
    made = trainer(models / "m0", text_set, tmp_path, dataset=train, eval_dataset=evals)
    made.evaluate()
    assert [abs(found["eval_rewards/margins"]) <= 1e-5 for found in made.state.log_history] == [True, True]


def test_splits_of_one_export(models: Path, tmp_path: Path) -> None:
    for seed, split in enumerate(("train", "test")):
        write_rows(tmp_path / "in" / f"{split}.parquet", text_rows(4, seed))
    export(tmp_path / "in", models / "m0", tmp_path / "out", split="train,test")
    made = trainer(
        models / "m0",
        tmp_path / "out",
        tmp_path,
        loaded(tmp_path / "out"),
        eval_dataset=loaded(tmp_path / "out", "test"),
    )
    assert (len(made.train_dataset), len(made.eval_dataset)) == (4, 4)


def test_ld_weighted_values(models: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(4))
    export(data, models / "m0", tmp_path / "out", loss_param=["ld_alpha=0.5"])
    found = first_log(trainer(models / "m0", tmp_path / "out", tmp_path / "t", ld_alpha=0.5))
    assert abs(found["rewards/chosen"]) <= 1e-5


def test_tools_and_template_arguments_reach_trl_as_they_were_scored(models: Path, tmp_path: Path) -> None:
    rows = chat_rows(4)
    for number, row in enumerate(rows):
        call = {"type": "function", "function": {"name": "f", "arguments": {"a" if number % 2 else "b": number}}}
        row["prompt"].append({"role": "assistant", "content": "", "tool_calls": [call]})
        row["prompt"].append({"role": "tool", "content": "7"})
        row["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {"p" if number % 2 else "q": 1}}}]
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ extra }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(models / "m0")
    tokenizer.chat_template = template
    data = write_rows(tmp_path / "d.parquet", rows)
    options = {"chat_template": template, "chat_template_kwargs": '{"extra": "x"}'}
    export(data, models / "m0", tmp_path / "out", **options)
    made = trainer(models / "m0", tmp_path / "out", tmp_path, processing_class=tokenizer)
    assert len(made.train_dataset) == 4


# --- TRL's own trainer, its command, and where the contract is found ------------------------------------------------


def test_a_folder_is_a_data_set_and_its_contract(text_set: Path, models: Path, tmp_path: Path) -> None:
    made = DPOTrainerWithRefLogps(str(models / "m0"), args=config(tmp_path), train_dataset=text_set)
    assert (len(made.train_dataset), made.contract["made_for"]) == (ROWS - 1, "trl")


def test_a_contract_that_is_not_found_says_what_was_looked_for(text_set: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no dpo_score\.json.*looked for .*integrations/dpo_score\.json.*contract="):
        DPOTrainerWithRefLogps(str(models / "m0"), args=config(tmp_path), train_dataset=loaded(text_set))


@pytest.fixture
def stock_trainer() -> Any:
    """TRL's own class, put back afterwards as it was."""
    import trl

    names = ("_prepare_dataset", "_precompute_ref_logps", "_takes_columns")
    before = {name: vars(trl.DPOTrainer).get(name, False) for name in names}
    yield trl.DPOTrainer
    for name, value in before.items():
        setattr(trl.DPOTrainer, name, value)


def test_the_stock_trainer_takes_the_columns_after_load(
    stock_trainer: Any, text_set: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps of TRL's own trainer on our values and of ours: the same losses, and no reference pass."""
    data = load(text_set, cache_dir=str(tmp_path / "hf"))["train"]
    options = {"precompute_ref_log_probs": True, "max_steps": 5, "per_device_train_batch_size": 4}
    monkeypatch.setattr(stock_trainer, "compute_ref_log_probs", None)
    losses = []
    for kind in (stock_trainer, DPOTrainerWithRefLogps):
        made = kind(str(models / "m0"), args=config(tmp_path, **options), train_dataset=data)
        made.train()
        losses.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_stock_trainer_is_not_let_ignore_the_columns(
    stock_trainer: Any, text_set: Path, models: Path, tmp_path: Path
) -> None:
    data = load(text_set, cache_dir=str(tmp_path / "hf"))["train"]
    with pytest.raises(ValueError, match=r"would ignore the reference log-probs.*precompute_ref_log_probs=True"):
        stock_trainer(str(models / "m0"), args=config(tmp_path), train_dataset=data)
    options = {"precompute_ref_log_probs": True, "max_length": 40}
    with pytest.raises(ValueError, match="max_length was 1024, here it is 40"):
        stock_trainer(str(models / "m0"), args=config(tmp_path, **options), train_dataset=data)


# --- it refuses, naming field and both values ----------------------------------------------------------------------


def test_a_cut_that_changes_no_row_is_the_same(text_set: Path, models: Path, tmp_path: Path) -> None:
    """Rows are shorter than each of these lengths, so every one leaves the tokens that were scored."""
    for length in (512, 1024, None):
        trainer(models / "m0", text_set, tmp_path, max_length=length)


def test_a_cut_that_changes_a_row_names_both_flags(text_set: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"max_length was 1024, here it is 40\..*DPOConfig\(max_length=1024\).*precompute --max-length 40`",
    ):
        trainer(models / "m0", text_set, tmp_path, max_length=40)


def test_rows_that_trl_drops_are_not_lost_without_a_word(text_set: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"TRL drops \d+ scored rows: .*DPOConfig\(max_length=1024\)"):
        trainer(models / "m0", text_set, tmp_path, max_length=8)


def test_truncation(text_set: Path, models: Path, tmp_path: Path) -> None:
    made = config(tmp_path, max_length=40)
    made.truncation_mode = "keep_end"
    with pytest.raises(ConfigError, match="truncation was keep_start, here it is keep_end"):
        DPOTrainerWithRefLogps(str(models / "m0"), args=made, train_dataset=loaded(text_set), contract=text_set)


def test_ld_alpha(text_set: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ld_alpha was None, here it is 0\.5"):
        trainer(models / "m0", text_set, tmp_path, ld_alpha=0.5)


def test_the_tokenizer(text_set: Path, models: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "m0")
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(ConfigError, match=r"tokenizer was [0-9a-f]{16}, here it is [0-9a-f]{16}"):
        trainer(models / "m0", text_set, tmp_path, processing_class=tokenizer)


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|new|>"])
def test_another_pad_token_is_the_same_tokenizer(pad: str, text_set: Path, models: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "m0")
    tokenizer.add_special_tokens({"pad_token": pad})
    trainer(models / "m0", text_set, tmp_path, processing_class=tokenizer)


def test_the_chat_template_counts_for_conversations(
    text_set: Path, chat_set: Path, models: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models / "m0")
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", " ")
    with pytest.raises(ConfigError, match=r"chat template was [0-9a-f]{16}, here it is [0-9a-f]{16}"):
        trainer(models / "m0", chat_set, tmp_path, processing_class=tokenizer)
    trainer(models / "m0", text_set, tmp_path, processing_class=tokenizer)


def test_the_date_of_a_template(models: Path, tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y') }}" + AutoTokenizer.from_pretrained(models / "m0").chat_template
    tokenizer = AutoTokenizer.from_pretrained(models / "m0")
    tokenizer.chat_template = template
    data = write_rows(tmp_path / "d.parquet", chat_rows(4))
    export(data, models / "m0", tmp_path / "out", chat_template=template, date="2024-07-26")
    with pytest.raises(ConfigError, match="the template's date was 2024-07-26, here it is 20"):
        trainer(models / "m0", tmp_path / "out", tmp_path, processing_class=tokenizer)
    export(data, models / "m0", tmp_path / "today", chat_template=template)
    trainer(models / "m0", tmp_path / "today", tmp_path, processing_class=tokenizer)


def test_transcripts_that_trl_splits_itself(models: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.parquet", hh_rows(4))
    export(data, models / "m0", tmp_path / "out")
    as_it_came = loaded(tmp_path / "out").remove_columns(["prompt", "chosen", "rejected"])
    as_it_came = as_it_came.rename_columns({"original_chosen": "chosen", "original_rejected": "rejected"})
    with pytest.raises(ConfigError, match=r"train row 0:0: .* prompt_split auto.*no prompt column, so TRL splits"):
        trainer(models / "m0", tmp_path / "out", tmp_path, dataset=as_it_came)
    assert len(trainer(models / "m0", tmp_path / "out", tmp_path).train_dataset) == 4


def test_a_row_that_was_edited(text_set: Path, models: Path, tmp_path: Path) -> None:
    edited = loaded(text_set).map(lambda row: {"chosen": f"{row['chosen']}!"} if row["row_id"] == "0:3" else {})
    with pytest.raises(ConfigError, match=r"train row 0:3: .*Scored: max_length 1024.*Here: max_length None"):
        trainer(models / "m0", text_set, tmp_path, dataset=edited)


def test_values_of_another_model_stop_the_first_step(text_set: Path, models: Path, tmp_path: Path) -> None:
    shifted = loaded(text_set).map(lambda row: {"ref_chosen_logps": (row["ref_chosen_logps"] or 0) + 0.5})
    made = trainer(models / "m0", text_set, tmp_path, dataset=shifted.select(range(1, ROWS)))
    with pytest.raises(ConfigError, match=r"first rewards must be 0; they are off by 0\.05.*beta × the noise floor"):
        made.train()


def test_a_changed_model_may_start_anywhere(text_set: Path, models: Path, tmp_path: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(models / "m0", dtype=torch.float32)
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert abs(first_log(trainer(policy, text_set, tmp_path, tokenizer_of=models / "m0"))["rewards/chosen"]) > 1e-3


def test_a_fresh_adapter_starts_at_the_reference(text_set: Path, models: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = trainer(models / "m0", text_set, tmp_path, peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert made._is_reference
    assert abs(first_log(made)["rewards/chosen"]) <= 1e-5


def test_what_is_missing_is_named(text_set: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no column 'ref_chosen_logps'"):
        trainer(models / "m0", text_set, tmp_path, dataset=loaded(text_set).remove_columns("ref_chosen_logps"))
    with pytest.raises(ConfigError, match="streamed"):
        trainer(models / "m0", text_set, tmp_path, dataset=loaded(text_set).to_iterable_dataset())
    with pytest.raises(ConfigError, match="ref_model"):
        DPOTrainerWithRefLogps(str(models / "m0"), AutoModelForCausalLM.from_pretrained(models / "m0"))


def test_renamed_columns_are_found_again(models: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "d.parquet", text_rows(4))
    export(data, models / "m0", tmp_path / "out", rename="ref_chosen_logps=reference_chosen_logps")
    assert "reference_chosen_logps" in loaded(tmp_path / "out").column_names
    assert len(trainer(models / "m0", tmp_path / "out", tmp_path).train_dataset) == 4


def test_the_contract_gives_away_no_folder(text_set: Path) -> None:
    assert json.loads((text_set / "dpo_score.json").read_text())["reference"]["name"] == "m0"
