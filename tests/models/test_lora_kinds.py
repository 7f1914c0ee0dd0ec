"""Adapters as peft writes them, of every kind it knows: logits are peft's own, and the base comes back unchanged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from dpo_score.errors import ModelError
from dpo_score.models.limits import embedding_rows
from dpo_score.models.loader import ModelLoader
from tests.models.model_folders import Fp32, logits, read, save_adapter, source
from tests.tiny import VOCAB, save_tiny

TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 4, "target_modules": TARGETS}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdaLoRA": ("AdaLoraConfig", {"target_modules": TARGETS, "init_r": 6, "target_r": 4, "total_step": 10}),
    "VeRA": ("VeraConfig", {"target_modules": TARGETS[:2], "r": 4}),
    "VeRA without projections": ("VeraConfig", {"target_modules": TARGETS[:2], "r": 4, "save_projection": False}),
    "UniLoRA, one vector for all layers": ("UniLoraConfig", {"target_modules": TARGETS, "r": 4}),
    "VB-LoRA": ("VBLoRAConfig", {"target_modules": TARGETS, "r": 4, "num_vectors": 20, "vector_length": 8, "topk": 2}),
    "LoRA with a bias, which has no merged form": ("LoraConfig", {**LORA, "lora_bias": True}),
    "Lily, which has no merged form": ("LilyConfig", {"target_modules": TARGETS, "r": 4}),
    "DoRA": ("LoraConfig", {**LORA, "use_dora": True}),
    "a whole parameter": ("LoraConfig", {"r": 4, "target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "RandLoRA": ("RandLoraConfig", {"target_modules": TARGETS, "r": 4}),
    "IA3": ("IA3Config", {"target_modules": TARGETS, "feedforward_modules": ["down_proj"]}),
    "OFT": ("OFTConfig", {"target_modules": TARGETS, "oft_block_size": 4}),
    "a saved norm": ("LoraConfig", {**LORA, "modules_to_save": ["norm"]}),
}
NEW_TOKENS: dict[str, dict[str, Any]] = {
    "trained whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved whole": {},
    "LoRA on the embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "trained row by row": {"trainable_token_indices": [VOCAB, VOCAB + 1]},
}
ADDED = 8


@pytest.fixture(scope="module", params=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "base"
    return save_tiny(folder, tie_word_embeddings=request.param == "tied")


def train(wrapped: PeftModel, base: Path) -> PeftModel:
    """Every trained parameter moved, as after a few steps."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.02)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    return wrapped


def check(base: Path, adapter: Path, expected: torch.Tensor) -> None:
    """Ours on the adapter, then on the base again."""
    loader = ModelLoader()
    assert (logits(loader.load(source(base, adapter), Fp32()).model) - expected).abs().max() < 1e-5
    bare = logits(loader.load(source(base), Fp32()).model)
    assert (bare - logits(read(base))).abs().max() < 1e-6
    assert loader.bases_read == 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, while the test makes and reads the adapter
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_adapter_gives_what_peft_gives(kind: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    name, settings = KINDS[kind]
    train(get_peft_model(read(base), getattr(peft, name)(**settings)), base).save_pretrained(tmp_path / "adapter")
    check(base, tmp_path / "adapter", logits(PeftModel.from_pretrained(read(base), tmp_path / "adapter").eval()))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("over", ["the plain base", "the resized base"])
@pytest.mark.parametrize("recipe", NEW_TOKENS)
def test_new_tokens_in_every_spelling_of_peft(recipe: str, over: str, base: Path, tmp_path: Path) -> None:
    model = read(base)
    model.resize_token_embeddings(VOCAB + ADDED, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    settings = {"r": 4, "target_modules": ["q_proj"], **NEW_TOKENS[recipe]}
    tied = model.config.tie_word_embeddings
    for name in ("modules_to_save", "target_modules"):  # of two tied embeddings the first is named
        settings[name] = [part for part in settings.get(name, []) if not (tied and part == "lm_head")]
    wrapped = train(get_peft_model(model, LoraConfig(**settings)), base)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)

    again = read(base)
    again.resize_token_embeddings(VOCAB + ADDED, mean_resizing=False)
    for own, first in ((again.get_input_embeddings(), "embed_tokens"), (again.get_output_embeddings(), "lm_head")):
        own.weight.data.copy_(read(tmp_path / "resized").get_parameter(name_of(again, own, first)).data)
    expected = logits(PeftModel.from_pretrained(again, tmp_path / "adapter").eval())
    stands_on = base if over == "the plain base" else tmp_path / "resized"
    assert embedding_rows(source(stands_on, tmp_path / "adapter")) == VOCAB + ADDED
    check(stands_on, tmp_path / "adapter", expected)


def name_of(model: Any, module: torch.nn.Module, first: str) -> str:
    return next(f"{name}.weight" for name, found in model.named_modules() if found is module and first in name)


def test_named_adapters_lie_in_subfolders_and_are_offered_by_name(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    for name in ("policy_a", "reference"):
        save_adapter(tmp_path / "both" / name, base)
    with pytest.raises(ModelError, match=r"2 named adapters in subfolders \(policy_a, reference\): name one of them"):
        source(tmp_path / "both")
    with pytest.raises(ModelError, match="2 named adapters"):
        source(base, tmp_path / "both")


def test_an_adapter_that_changes_nothing_is_said(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(tmp_path / "zero", base, weight=0.0)
    loader = ModelLoader()
    assert "changes nothing" in loader.load(source(base, adapter), Fp32()).notes[0]
    assert loader.load(source(base), Fp32()).notes == ()
    assert loader.load(source(base, save_adapter(tmp_path / "some", base)), Fp32()).notes == ()


def test_a_text_only_adapter_over_a_multimodal_wrapper_is_told_as_what_it_is(tmp_path: Path) -> None:
    text = json.loads((save_tiny(tmp_path / "text") / "config.json").read_text())
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=299)
    wrapper = AutoModelForImageTextToText.from_config(config)
    wrapper.save_pretrained(tmp_path / "wrapper")
    adapter = save_adapter(tmp_path / "adapter", tmp_path / "text")
    with warnings.catch_warnings(), pytest.raises(ModelError, match="named as in the text-only class"):
        ModelLoader().load(source(tmp_path / "wrapper", adapter), Fp32())


def test_a_second_copy_of_other_values_is_no_copy(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"])
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = "base_model.model.lm_head"
    save_file({**weights, f"{name}.modules_to_save.weight": weights[f"{name}.weight"] + 1}, path)
    with pytest.raises(ModelError, match=r"without a place in the base, 1 tensors .*modules_to_save"):
        ModelLoader().load(source(base, adapter), Fp32())
