"""What a model folder may hold: every refusal with its reason, and that nothing refused was ever opened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_score.errors import HalfWrittenError, ModelError
from tests.models.model_folders import edit, source, write_canary


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        source(folder, **options)
    assert "\n" not in str(caught.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such model: .*neither a folder here .* nor the form of a hub id")


def test_a_file_that_is_no_folder(folder: Path) -> None:
    refused(folder / "config.json", r"is a file: name the folder that holds config\.json")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, r"has no config\.json: it is half written")
    (folder / "model.safetensors").unlink()
    refused(folder, r"has no config\.json: it is not a model folder")


def test_a_folder_of_gguf_files_names_them(tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "a.Q4_1.gguf").touch()
    refused(tmp_path / "gguf", r"name one of its files \(a\.Q4_1\.gguf\)")


def test_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(folder, "is not valid JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "holds a JSON list, not an object")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "has no weights")
    (folder / "model-00001-of-00002.safetensors").touch()
    refused(folder, r"model-00001-of-00002\.safetensors but no index")


def test_shards_that_the_index_names_but_are_absent(sharded: Path) -> None:
    first = source(sharded).weights[0]
    first.unlink()
    refused(sharded, f"is half written: .* 1 of them absent .first: {first.name}")


def test_a_shard_without_a_tensor_that_the_index_names(sharded: Path) -> None:
    first, second, *_ = source(sharded).weights
    shutil.copy(first, second)
    refused(sharded, r"lacks \d tensors that model\.safetensors\.index\.json names")


def test_an_index_that_reaches_out_of_the_folder(sharded: Path) -> None:
    edit(sharded / "model.safetensors.index.json", weight_map={"a": "../model.safetensors"})
    refused(sharded, "not a file of the same folder")
    edit(sharded / "model.safetensors.index.json", weight_map={})
    refused(sharded, "no weight_map")


def test_a_config_that_names_weights_elsewhere(folder: Path) -> None:
    edit(folder / "config.json", transformers_weights="../other.safetensors")
    refused(folder, "only a safetensors file of that folder is read")
    edit(folder / "config.json", transformers_weights="weights.bin")
    refused(folder, "only a safetensors file of that folder is read")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 200, 3000, -1])
def test_safetensors_cut_anywhere(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "is empty|is not a whole safetensors file|truncated or damaged|damaged safetensors header")


def test_safetensors_with_a_broken_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8] ^= 0xFF
    path.write_bytes(data)
    refused(folder, "damaged safetensors header")


def test_a_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused(folder, "git lfs pull")


def test_pickles_alone_are_refused_and_never_opened(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    canary = write_canary(folder / "pytorch_model.bin", tmp_path / "canary")
    refused(folder, r"only as pickle \(pytorch_model\.bin\).*--allow-pickle")
    assert not canary.exists()


def test_a_pickle_beside_safetensors_is_left_alone(folder: Path, tmp_path: Path) -> None:
    canary = write_canary(folder / "pytorch_model.bin", tmp_path / "canary")
    found = source(folder, allow_pickle=True)
    assert found.weights == (folder / "model.safetensors",)
    assert not found.pickle
    assert not canary.exists()


def test_allowed_pickles_are_part_of_the_source(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    found = source(folder, allow_pickle=True)
    assert found.pickle
    assert found.weights == (folder / "pytorch_model.bin",)


def test_a_pickle_of_an_unknown_name_is_refused_even_when_allowed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.pt")
    refused(folder, r"weights\.pt is not a name that transformers reads", allow_pickle=True)


@pytest.mark.parametrize(("left", "reason"), [(-30, "truncated"), (0, "empty")])
def test_a_cut_archive_is_half_written(folder: Path, adapter: Path, left: int, reason: str) -> None:
    """torch.save writes a zip archive, whose directory comes last."""
    for place, name in ((adapter, "adapter_model"), (folder, "model")):
        pickled = place / ("adapter_model.bin" if place is adapter else "pytorch_model.bin")
        torch.save({"a": torch.ones(100)}, pickled)
        (place / f"{name}.safetensors").unlink()
        whole = source(folder, adapter, allow_pickle=True)
        assert whole.pickle
        content = pickled.read_bytes()
        pickled.write_bytes(content[:left])
        with pytest.raises(HalfWrittenError, match=f"{pickled.name} is {reason}"):
            source(folder, adapter, allow_pickle=True)
        pickled.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"trust_remote_code": True},
        {"_attn_implementation_internal": "org/kernel"},
        {"text_config": {"inner": [{"_attn_implementation": "org/kernel"}]}},
    ],
)
def test_a_folder_that_asks_for_code_is_refused(folder: Path, name: str, change: dict[str, Any]) -> None:
    edit(folder / name, **change)
    (folder / "evil.py").write_text("import os; os.mkdir('canary')")
    refused(folder, f"{name} contains .*--trust-remote-code")
    assert source(folder, trust_remote_code=True).digest


def test_a_folder_that_is_both_model_and_adapter(folder: Path, adapter: Path) -> None:
    shutil.copy(adapter / "adapter_config.json", folder)
    refused(folder, "holds both full weights and adapter_config.json")


def test_an_adapter_pickle_is_refused_and_never_opened(saved: Path, adapter: Path, tmp_path: Path) -> None:
    canary = write_canary(adapter / "adapter_model.bin", tmp_path / "canary")
    assert source(saved, adapter).adapter_files == (adapter / "adapter_model.safetensors",)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"only as pickle \(adapter_model\.bin\)"):
        source(saved, adapter)
    assert source(saved, adapter, allow_pickle=True).pickle
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match="the adapter is half written"):
        source(saved, adapter)
    assert not canary.exists()


def test_a_folder_without_adapter_config_is_no_adapter(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no adapter_config\.json: name a folder written by PEFT"):
        source(saved, tmp_path)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**6}, {"text_config": {"num_hidden_layers": 10**6}}])
def test_more_layers_than_the_weights_have_tensors_are_refused_before_they_are_built(
    folder: Path, change: dict[str, Any]
) -> None:
    edit(folder / "config.json", **change)
    refused(folder, r"config\.json says num_hidden_layers 1,000,000, but the weights beside it hold 2\d tensors")


@pytest.mark.parametrize("depth", [200, 900, 20_000])
def test_a_configuration_nested_without_end_is_refused(folder: Path, depth: int) -> None:
    (folder / "config.json").write_text('{"a": ' * depth + "1" + "}" * depth)
    refused(folder, "nested more than 100 levels deep")
