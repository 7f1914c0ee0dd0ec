"""Loading: the checkpoint's own weights in the asked dtype, one base at a time, nothing left at random."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from dpo_score.errors import ModelError, WeightsChangedError
from dpo_score.models.loader import ModelLoader, Prefetch
from tests.models.model_folders import IDS, Bf16, Fp32, logits, save_adapter, source, write_canary
from tests.tiny import save_tiny, tiny_config, tiny_model

TIED: dict[str, Any] = {"tie_word_embeddings": True}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("saved") / "model", **TIED, attention_dropout=0.5)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_a_loaded_model_gives_the_logits_of_the_one_that_was_saved(saved: Path) -> None:
    loaded = ModelLoader().load(source(saved), Fp32())
    assert torch.equal(logits(loaded.model), logits(tiny_model(tie_word_embeddings=True)))
    assert loaded.source == source(saved)


def test_a_loaded_model_is_tied_frozen_and_without_dropout(saved: Path) -> None:
    model = ModelLoader().load(source(saved), Fp32()).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dtype_and_attention_are_those_asked_for(saved: Path) -> None:
    loader = ModelLoader()
    model = loader.load(source(saved), Bf16(), "eager").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert loader.load(source(saved), Bf16(), "sdpa").model.config._attn_implementation == "sdpa"
    assert loader.bases_read == 1


def test_equal_weights_are_read_once_other_weights_or_dtypes_again(saved: Path, folder: Path, tmp_path: Path) -> None:
    loader = ModelLoader()
    first = loader.load(source(saved), Fp32())
    assert loader.load(source(folder), Fp32()).model is first.model
    loader.load(source(folder, save_adapter(tmp_path / "adapter", folder)), Fp32())
    assert loader.bases_read == 1
    loader.load(source(folder), Bf16())
    assert loader.bases_read == 2
    other = save_tiny(tmp_path / "other", seed=1)
    loader.load(source(other), Bf16())
    assert loader.bases_read == 3


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_weights_that_change_after_they_were_resolved_are_not_loaded(
    what: str, saved: Path, folder: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", saved)
    found = source(folder, adapter)
    path = folder / "model.safetensors" if what == "base" else adapter / "adapter_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(ModelError, match="changed or vanished after this run began"):
        ModelLoader().load(found, Fp32())
    assert ModelLoader().load(source(folder, adapter), Fp32()).model is not None
    path.unlink()
    with pytest.raises(ModelError, match="changed or vanished"):
        ModelLoader().load(found, Fp32())


def test_clear_lets_go_of_the_model(saved: Path) -> None:
    import weakref

    loader = ModelLoader()
    gone = weakref.ref(loader.load(source(saved), Fp32()).model)
    loader.clear()
    assert gone() is None


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    weights = {**load_file(path), **{key.replace("__", "."): value for key, value in changes.items()}}
    save_file({key: value for key, value in weights.items() if value is not None}, path, {"format": "pt"})


def test_weights_that_the_checkpoint_lacks_are_named_not_drawn_at_random(folder: Path) -> None:
    rewrite(folder, model__layers__0__mlp__up_proj__weight=None, model__norm__weight=None)
    with pytest.raises(ModelError, match=r"2 missing from the checkpoint \(model\.layers\.0\.mlp\.up_proj\.weight, "):
        ModelLoader().load(source(folder), Fp32())


def test_weights_that_the_model_does_not_know_are_named_not_ignored(folder: Path) -> None:
    rewrite(folder, model__layers__0__self_attn__q_proj__bias=torch.zeros(32))
    with pytest.raises(ModelError, match=r"1 unknown to the model \(model\.layers\.0\.self_attn\.q_proj\.bias\)"):
        ModelLoader().load(source(folder), Fp32())


@pytest.mark.parametrize(
    ("tensor", "shape", "cause"),
    [
        ("model__norm__weight", (31,), "config.json belongs to a model of another size"),
        ("model__embed_tokens__weight", (310, 32), "set its vocab_size to 310"),
        ("model__layers__0__mlp__up_proj__weight", (2048,), "FSDP keeps it"),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_both_shapes_and_the_cause(
    tensor: str, shape: tuple[int, ...], cause: str, folder: Path
) -> None:
    rewrite(folder, **{tensor: torch.ones(shape)})
    with pytest.raises(ModelError, match=re.escape(tensor.replace("__", "."))) as caught:
        ModelLoader().load(source(folder), Fp32())
    assert f"has the shape {list(shape)} in the file and [" in str(caught.value)
    assert cause in str(caught.value)
    assert "above" not in str(caught.value)


def test_empty_tensors_of_zero_3_are_called_that(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.ones(0))
    with pytest.raises(ModelError, match=r"1 empty tensors .*DeepSpeed ZeRO-3.*zero_to_fp32\.py"):
        source(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_that_a_wrapper_prefixed_are_read(prefix: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({f"{prefix}{name}": value for name, value in load_file(path).items()}, path, {"format": "pt"})
    assert torch.equal(logits(ModelLoader().load(source(folder), Fp32()).model), logits(tiny_model(**TIED)))


def sharded(folder: Path) -> dict[str, Any]:
    """The model in shards; returns its index."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder / "shards", max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    for path in (folder / "shards").glob("model*"):
        path.rename(folder / path.name)
    return dict(json.loads((folder / "model.safetensors.index.json").read_text()))


@pytest.mark.parametrize("fault", ["a stub beside the shards", "an index without a shard", "an index without a tensor"])
def test_weights_that_are_whole_beside_a_wrong_index_or_stub_are_read(fault: str, folder: Path) -> None:
    index = sharded(folder)
    if fault == "a stub beside the shards":
        save_file({"model.norm.weight": torch.zeros(32)}, folder / "model.safetensors", {"format": "pt"})
    elif fault == "an index without a shard":
        shard = index["weight_map"]["model.norm.weight"]
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard}
    else:
        del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(ModelLoader().load(source(folder), Fp32()).model), logits(tiny_model(**TIED)))


def test_two_whole_saves_in_one_folder_must_be_the_same_weights(folder: Path, tmp_path: Path) -> None:
    single = (folder / "model.safetensors").read_bytes()
    sharded(folder)
    (folder / "model.safetensors").write_bytes(single)
    expected = logits(tiny_model(**TIED))
    assert torch.equal(logits(ModelLoader().load(source(folder), Fp32()).model), expected)
    other = {name: tensor + 0.01 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"two sets of weights that differ .* shards of model\.safetensors\.index"):
        source(folder)
    next(folder.glob("model-*.safetensors")).unlink()  # an index that was left behind
    assert not torch.equal(logits(ModelLoader().load(source(folder), Fp32()).model), expected)


# What was digested is what is computed with


def overwritten(path: Path) -> None:
    """Other content of the same size in the same file, as `cp` writes it, with the old time of change put back."""
    import os

    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-64:] = bytes(64)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_changes_before_or_while_it_is_loaded_ends_the_load(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = source(folder)
    path, loader = folder / name, ModelLoader()
    read = ModelLoader._read

    def read_then_overwritten(self: ModelLoader, *arguments: Any) -> Any:
        model = read(self, *arguments)
        overwritten(path)
        return model

    monkeypatch.setattr(ModelLoader, "_read", read_then_overwritten)
    with pytest.raises(WeightsChangedError, match=rf"{name} changed"):
        loader.load(found, Fp32())
    with pytest.raises(WeightsChangedError, match=rf"{name} changed"):
        loader.load(found, Fp32())
    assert loader.bases_read == 0


def test_a_loaded_model_does_not_see_later_writes_to_its_file(folder: Path) -> None:
    found = source(folder)
    model = ModelLoader().load(found, Fp32()).model
    before = logits(model)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000] + bytes(path.stat().st_size - 1000))
    assert torch.equal(logits(model), before)
    with pytest.raises(WeightsChangedError, match=r"model\.safetensors changed or vanished"):
        found.refuse_changed()


BESIDE = {
    "a rotary buffer": "model.layers.0.self_attn.rotary_emb.inv_freq",
    "a position buffer": "model.embeddings.position_ids",
    "a mask buffer": "model.layers.0.self_attn.masked_bias",
    "a value head": "v_head.summary.weight",
}


@pytest.mark.parametrize("key", BESIDE.values(), ids=BESIDE)
def test_tensors_that_no_logit_depends_on_may_stand_beside(key: str, folder: Path) -> None:
    twin = logits(ModelLoader().load(source(folder), Fp32()).model)
    rewrite(folder, **{key.replace(".", "__"): torch.ones(4)})
    assert torch.equal(logits(ModelLoader().load(source(folder), Fp32()).model), twin)


@pytest.mark.parametrize(
    "key", ["score.weight", "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.7.mlp.up_proj.weight"]
)
def test_tensors_that_another_model_would_use_are_named(key: str, folder: Path) -> None:
    rewrite(folder, **{key.replace(".", "__"): torch.ones(4)})
    with pytest.raises(ModelError, match=rf"1 unknown to the model \({re.escape(key)}\)"):
        ModelLoader().load(source(folder), Fp32())


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_head_beside_tied_embeddings_is_taken_as_transformers_takes_it(change: float, folder: Path) -> None:
    rewrite(folder, lm_head__weight=load_file(folder / "model.safetensors")["model.embed_tokens.weight"] + change)
    model = ModelLoader().load(source(folder), Fp32()).model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (change == 0.0)
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(logits(model), logits(twin))


def test_only_the_first_five_keys_are_listed(folder: Path) -> None:
    rewrite(folder, **{f"extra__{i}": torch.zeros(1) for i in range(9)})
    with pytest.raises(ModelError, match=r"9 unknown to the model \(extra\.0, .*extra\.4, …\)"):
        ModelLoader().load(source(folder), Fp32())


def test_an_untied_model_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "headless")
    rewrite(folder, lm_head__weight=None)
    with pytest.raises(ModelError, match=r"1 missing from the checkpoint \(lm_head\.weight\)"):
        ModelLoader().load(source(folder), Fp32())


def test_a_reward_model_is_refused_as_what_it_is(tmp_path: Path) -> None:
    LlamaForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "reward")
    with pytest.raises(ModelError, match="is a classifier"):
        ModelLoader().load(source(tmp_path / "reward"), Fp32())


def test_an_architecture_that_transformers_does_not_know(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"no_such_architecture"'))
    with pytest.raises(ModelError, match=r"could not be loaded.*no_such_architecture"):
        ModelLoader().load(source(folder), Fp32())


@pytest.mark.parametrize(("key", "value"), [("vocab_size", "x"), ("num_attention_heads", 0), ("hidden_act", 3)])
def test_a_configuration_with_an_impossible_value_is_named(folder: Path, key: str, value: Any) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(ModelError, match=re.escape(str(folder)) + ".*could not be loaded"):
        ModelLoader().load(source(folder), Fp32())


@pytest.mark.parametrize("when", ["placed", "read"])
def test_a_device_without_room_for_the_model_is_said_with_the_ways_out(
    saved: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore lines")

    method = "to" if when == "placed" else "from_pretrained"
    monkeypatch.setattr(PreTrainedModel, method, full)
    ways_out = "--dtype.*--quantization.*--tensor-parallel.*--device-map"
    with pytest.raises(ModelError, match=rf"in float32 does not fit on cpu .*20\.00 GiB\).*{ways_out}") as error:
        ModelLoader().load(source(saved), Fp32())
    assert "\n" not in str(error.value)


def test_an_allowed_pickle_loads_the_same_weights(folder: Path) -> None:
    twin = logits(ModelLoader().load(source(folder), Fp32()).model)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    loaded = ModelLoader().load(source(folder, allow_pickle=True), Fp32())
    assert torch.equal(logits(loaded.model), twin)


def test_a_hostile_pickle_does_not_run_even_when_pickles_are_allowed(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    canary = write_canary(folder / "pytorch_model.bin", tmp_path / "canary")
    with pytest.raises(ModelError, match="could not be loaded"):
        ModelLoader().load(source(folder, allow_pickle=True), Fp32())
    assert not canary.exists()


def test_an_encoder_decoder_loads_with_its_decoder(tmp_path: Path) -> None:
    config = AutoConfig.for_model("t5", vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    found = source(tmp_path / "t5")
    model = ModelLoader().load(found, Fp32()).model
    assert found.is_encoder_decoder
    with torch.inference_mode():
        assert model(input_ids=IDS % 64, decoder_input_ids=IDS % 64).logits.shape[-1] == 64


def test_a_vision_language_wrapper_scores_text(tmp_path: Path) -> None:
    folder = save_vision_language(tmp_path / "vlm")
    model = ModelLoader().load(source(folder), Fp32()).model
    twin = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(model), logits(twin.eval()))


def save_vision_language(folder: Path) -> Path:
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 16,
    }
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=299)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def test_quantization_needs_its_package(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        ModelLoader(quantization="nf4").load(source(saved), Fp32())


def test_prefetch_reads_ahead_and_never_fails(saved: Path, tmp_path: Path) -> None:
    loader = ModelLoader()
    loader.prefetch(source(saved))
    assert loader.load(source(saved), Fp32()).model is not None
    loader.prefetch(source(saved))
    loader.clear()
    Prefetch([tmp_path / "gone.safetensors"]).wait()
    Prefetch([saved / "model.safetensors"]).stop()
