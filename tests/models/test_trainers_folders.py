"""Folders as trainers leave them: read where their names say all, else refused by what they are, never called half
written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_score.errors import HalfWrittenError, ModelError
from dpo_score.models.loader import ModelLoader
from dpo_score.models.resolve import ModelSource
from dpo_score.models.state_dict import own_names
from tests.models.model_folders import Fp32, logits, read, source
from tests.tiny import save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def loaded(found: ModelSource) -> torch.Tensor:
    return logits(ModelLoader().load(found, Fp32()).model)


def shards(folder: Path, stem: str, index: bool) -> None:
    whole = folder / "model.safetensors"
    tensors = list(load_file(whole).items())
    whole.unlink()
    names = [f"{stem}-{number + 1:05d}-of-00002.safetensors" for number in range(2)]
    for number, name in enumerate(names):
        save_file(dict(tensors[number::2]), folder / name, metadata={"format": "pt"})
    if index:
        names_of = {key: names[number % 2] for number, (key, _) in enumerate(tensors)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names_of}))


def renamed(prefix: str, **more: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})

    return change


READ: dict[str, Callable[[Path], None]] = {
    "torchtune, with an index": lambda folder: shards(folder, "ft-model", index=True),
    "torchtune, without": lambda folder: shards(folder, "ft-model", index=False),
    "shards without an index": lambda folder: shards(folder, "model", index=False),
    "a trainer's prefix": renamed("policy."),
    "PEFT's prefix": renamed("base_model.model."),
    "TRL's value head": renamed("pretrained_model.", **{"v_head.summary.bias": torch.zeros(1)}),
}


@pytest.mark.parametrize("how", READ)
def test_weights_by_other_names_are_the_same_weights(how: str, folder: Path) -> None:
    expected = logits(read(folder))
    READ[how](folder)
    assert (loaded(source(folder)) - expected).abs().max() == 0


def test_one_shard_that_is_cut_is_half_written(folder: Path) -> None:
    shards(folder, "model", index=False)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(HalfWrittenError, match="truncated"):
        source(folder)
    path.unlink()
    with pytest.raises(HalfWrittenError, match="no index"):
        source(folder)


def alone_as(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def outer(folder: Path) -> None:
    shutil.copytree(folder, folder / "checkpoint-10")
    (folder / "model.safetensors").unlink()


def run_folder(folder: Path) -> None:
    outer(folder)
    (folder / "config.json").unlink()


def pointer(folder: Path) -> None:
    (folder / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a variant": (alone_as("model.fp16.safetensors"), "call them model.safetensors"),
    "a merged model below its configuration": (outer, r"1 in subfolders \(checkpoint-10\)"),
    "the folder of a run": (run_folder, r"1 in subfolders \(checkpoint-10\)"),
    "a pointer for config.json": (pointer, "git lfs pull"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_other_layouts_are_refused_by_what_they_are(how: str, folder: Path) -> None:
    change, said = REFUSED[how]
    change(folder)
    with pytest.raises(ModelError, match=said) as refused:
        source(folder)
    assert not isinstance(refused.value, HalfWrittenError)


def test_two_models_in_one_file_are_not_chosen_between() -> None:
    expected = ["a.weight", "b.weight"]
    both = [f"{part}.{name}" for part in ("model", "ema") for name in expected]
    with pytest.raises(ModelError, match="holds 2 models, under ema, model"):
        own_names(both, expected, Path("last.ckpt"))
    beside = [f"{part}.{name}" for part in ("optimizer", "model") for name in expected]
    assert own_names(beside, expected, Path("last.ckpt")) == {name: f"model.{name}" for name in expected}
