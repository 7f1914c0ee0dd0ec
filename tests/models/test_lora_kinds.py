"""What is said of adapters that are named, that do nothing, that belong to another class or are damaged.

That each kind gives what peft gives: tests/parity/test_adapters.py.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from dpo_score.errors import ModelError
from dpo_score.models.loader import ModelLoader
from tests.models.model_folders import Fp32, save_adapter, source
from tests.tiny import save_tiny


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
