"""Adapters over one loaded base: the numbers of peft, the base untouched, one read of the weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_score.errors import ModelError
from dpo_score.models.loader import ModelLoader
from tests.models.model_folders import Bf16, Fp32, logits, save_adapter, sha256, source, unmerged_logits
from tests.tiny import VOCAB, save_tiny, tiny_model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tied") / "tied", tie_word_embeddings=True)


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model: Any, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in before)


def relative(ours: torch.Tensor, twin: torch.Tensor) -> float:
    """Largest difference over the largest logit (the tiny models' logits reach 10)."""
    return float((ours - twin).abs().max() / twin.abs().max())


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "every linear layer": {"target_modules": "all-linear"},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embeddings": {"modules_to_save": ["embed_tokens"]},
    "embedding as a target": {"target_modules": ["q_proj", "embed_tokens"]},
    "head as a target": {"target_modules": ["q_proj", "lm_head"]},
    "single tokens": {"trainable_token_indices": [5, 7, 256]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own advice, given while the folders are written
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_logits_are_those_of_the_unmerged_adapter(
    variant: str, tied: bool, base: Path, tied_base: Path, tmp_path: Path
) -> None:
    folder = tied_base if tied else base
    adapter = save_adapter(tmp_path / "adapter", folder, **VARIANTS[variant])
    loader = ModelLoader()
    plain = loader.load(source(folder), Fp32())
    before, reference = bits(plain.model), logits(plain.model)

    worn = logits(loader.load(source(folder, adapter), Fp32()).model)
    assert relative(worn, unmerged_logits(folder, adapter)) <= 1e-5
    assert not torch.allclose(worn, reference, atol=1e-3)

    again = loader.load(source(folder), Fp32())
    assert same_bits(again.model, before)
    assert torch.equal(logits(again.model), reference)


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": ({"n_embd": 32, "n_head": 4, "n_layer": 2, "tie_word_embeddings": True}, {"target_modules": ["c_attn"]}),
    "qwen2": ({}, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "gemma2": ({"query_pre_attn_scalar": 8, "tie_word_embeddings": True}, {"target_modules": "all-linear"}),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_merge_and_restore_too(family: str, tmp_path: Path) -> None:
    overrides, lora = FAMILIES[family]
    folder = save_tiny(tmp_path / "base", family, **overrides)
    adapter = save_adapter(tmp_path / "adapter", folder, **lora)
    loader = ModelLoader()
    before = bits(loader.load(source(folder), Fp32()).model)
    worn = logits(loader.load(source(folder, adapter), Fp32()).model)
    assert relative(worn, unmerged_logits(folder, adapter)) <= 1e-5
    again = loader.load(source(folder), Fp32()).model
    assert same_bits(again, before)
    assert not torch.equal(worn, logits(again))


def test_swapping_a_to_b_to_base_reads_the_base_once_and_restores_it(base: Path, tmp_path: Path) -> None:
    a = save_adapter(tmp_path / "a", base, seed=1)
    b = save_adapter(tmp_path / "b", base, seed=2, use_dora=True, target_modules=["k_proj", "o_proj"])
    on_disk = sha256(base / "model.safetensors")
    loader = ModelLoader()
    before = bits(loader.load(source(base), Fp32()).model)
    first = logits(loader.load(source(base, a), Fp32()).model)
    loader.load(source(base, b), Fp32())
    assert torch.equal(logits(loader.load(source(base, a), Fp32()).model), first)
    assert same_bits(loader.load(source(base), Fp32()).model, before)
    assert loader.bases_read == 1
    assert sha256(base / "model.safetensors") == on_disk


def test_the_same_adapter_twice_is_not_merged_twice(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", base)
    loader = ModelLoader()
    once = logits(loader.load(source(base, adapter), Fp32()).model)
    assert torch.equal(logits(loader.load(source(base, adapter), Fp32()).model), once)


def test_a_zero_adapter_gives_the_exact_weights_of_the_base(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "zero", base, weight=0.0)
    loader = ModelLoader()
    before = bits(loader.load(source(base), Fp32()).model)
    assert same_bits(loader.load(source(base, adapter), Fp32()).model, before)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_16_bits_the_adapter_stays_unmerged_and_the_base_comes_back(
    variant: str, tied_base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", tied_base, **VARIANTS[variant])
    loader = ModelLoader()
    before = bits(loader.load(source(tied_base), Bf16()).model)
    worn = logits(loader.load(source(tied_base, adapter), Bf16()).model)
    twin = unmerged_logits(tied_base, adapter)
    assert relative(worn, twin) < 0.1
    again = loader.load(source(tied_base), Bf16()).model
    assert same_bits(again, before)
    assert relative(logits(again), worn) > 1e-3


def test_in_16_bits_small_deltas_survive(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "small", base, weight=1e-3)
    loader = ModelLoader()
    before = bits(loader.load(source(base), Bf16()).model)
    reference = logits(loader.load(source(base), Bf16()).model)
    model = loader.load(source(base, adapter), Bf16()).model
    assert any("lora_A" in name for name in model.state_dict())
    assert not torch.equal(logits(model), reference)
    again = loader.load(source(base), Bf16()).model
    assert same_bits(again, before)
    assert torch.equal(logits(again), reference)


def test_added_tokens_resize_the_base_first_and_shrink_it_again_after(base: Path, tmp_path: Path) -> None:
    adapter = grown_adapter(tmp_path / "grown", base, extra=3)
    loader = ModelLoader()
    before = bits(loader.load(source(base), Fp32()).model)
    model = loader.load(source(base, adapter), Fp32()).model
    assert logits(model).shape[-1] == VOCAB + 3 == model.config.vocab_size
    twin = grown_twin(base, adapter, VOCAB + 3)
    assert relative(logits(model), twin) <= 1e-5
    again = loader.load(source(base), Fp32()).model
    assert again.config.vocab_size == VOCAB
    assert same_bits(again, before)


def grown_adapter(folder: Path, base: Path, extra: int) -> Path:
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    model.resize_token_embeddings(VOCAB + extra, mean_resizing=False)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder, save_embedding_layers=True)
    return folder


def grown_twin(base: Path, adapter: Path, rows: int) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return logits(PeftModel.from_pretrained(model, adapter).eval())


def test_added_tokens_without_their_head_rows_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = grown_adapter(tmp_path / "grown", base, extra=3)
    weights = load_file(adapter / "adapter_model.safetensors")
    weights = {key: value for key, value in weights.items() if "lm_head" not in key}
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="saves only one of the two embeddings"):
        ModelLoader().load(source(base, adapter), Fp32())


def test_an_adapter_of_another_shape_is_refused_and_the_base_stays_usable(base: Path, tmp_path: Path) -> None:
    wide = tiny_folder_adapter(tmp_path, hidden_size=64, head_dim=16)
    loader = ModelLoader()
    before = bits(loader.load(source(base), Fp32()).model)
    with pytest.raises(ModelError, match="does not fit its base"):
        loader.load(source(base, wide), Fp32())
    assert same_bits(loader.load(source(base), Fp32()).model, before)
    assert loader.bases_read == 1


def tiny_folder_adapter(tmp_path: Path, **overrides: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny_model(**overrides), LoraConfig(r=4, target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_adapter_tensors_that_are_absent_or_too_many_are_named(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", base)
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    gone = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != gone}, path)
    with pytest.raises(ModelError, match=r"lacks 1 tensors.*lora_A"):
        ModelLoader().load(source(base, adapter), Fp32())
    save_file(
        {**weights, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": weights[gone].clone()}, path
    )
    with pytest.raises(ModelError, match=r"without a place in the base, 1 tensors.*layers\.9"):
        ModelLoader().load(source(base, adapter), Fp32())


def test_adapters_that_change_the_input_are_refused(base: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    wrapped = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    wrapped.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match="PROMPT_TUNING adapter"):
        ModelLoader().load(source(base, tmp_path / "prompt"), Fp32())


def test_without_peft_the_error_says_how_to_install_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = source(base, save_adapter(tmp_path / "a", base))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else sys.modules)
    with pytest.raises(ModelError, match=r'pip install "dpo-score\[adapters\]"'):
        ModelLoader().load(adapter, Fp32())


def test_an_adapter_config_that_peft_cannot_read_is_one_paragraph(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NOT_A_TYPE"}))
    with pytest.raises(ModelError, match=r"peft does not read its adapter_config\.json"):
        ModelLoader().load(source(base, adapter), Fp32())
