"""Checkpoints of other tools, read over a base: the same logits as the model they were saved from."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from dpo_score.config.schema import PolicySpec
from dpo_score.errors import HalfWrittenError, ModelError
from dpo_score.models.loader import ModelLoader
from dpo_score.models.resolve import ModelSource, Resolver, resolve_policy
from dpo_score.models.state_dict import own_names
from tests.models.model_folders import Canary, Fp32, logits, sha256, source
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


State = dict[str, torch.Tensor]


@pytest.fixture
def state() -> State:
    """The trained weights: those of another seed than the base's."""
    return dict(tiny_model(seed=5).state_dict())


def trained() -> torch.Tensor:
    return logits(tiny_model(seed=5))


def policy(path: Path, base: Path, allow_pickle: bool = True, said: str | None = "reference") -> ModelSource:
    resolver = Resolver(path.parent / "cache", sha256, allow_pickle=allow_pickle)
    return resolve_policy(PolicySpec(name="p", model=str(path), base=said), source(base), None, resolver)


def save_dcp(folder: Path, content: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it saves from a single process
        dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


def torch_save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def wrapped(state: State, segment: str) -> State:
    return {f"{segment}.{name}": tensor for name, tensor in state.items()}


def folder_with(path: Path, write: Callable[[Path], object]) -> Path:
    path.mkdir()
    write(path)
    return path


def zero_folder(folder: Path, state: State) -> Path:
    """What DeepSpeed leaves under ZeRO 1 or 2, with the file names that the Trainer leaves beside it."""
    for step in (9, 10):
        inside = folder / f"global_step{step}"
        inside.mkdir(parents=True)
        shapes = [{name: tensor.shape for name, tensor in state.items()}]
        content = state if step == 10 else {name: tensor + 1 for name, tensor in state.items()}
        torch_save({"module": content, "param_shapes": shapes, "ds_version": "0.18"}, inside / ZERO)
        torch_save({"optimizer_state_dict": {"a": torch.ones(2)}}, inside / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text("global_step10")
    (folder / "zero_to_fp32.py").write_text("raise SystemExit('never run')")
    return folder


ZERO = "mp_rank_00_model_states.pt"
FORMS: dict[str, Callable[[State, Path], Path]] = {
    "the reference implementation's policy.pt": lambda s, p: torch_save(
        {"step_idx": 7, "state": s, "metrics": {"loss/eval": 0.5}}, p / "policy.pt"
    ),
    "the reference implementation's folder": lambda s, p: folder_with(
        p / "step-7",
        lambda f: (torch_save({"state": s}, f / "policy.pt"), torch_save({"lr": 0.1}, f / "optimizer.pt")),
    ),
    "a bare state dict": lambda s, p: torch_save(s, p / "pytorch_model.bin"),
    "a state dict under DDP": lambda s, p: torch_save(wrapped(s, "module"), p / "ddp.pth"),
    "a state dict under torch.compile": lambda s, p: torch_save({"model": wrapped(s, "_orig_mod")}, p / "compiled.pt"),
    "a DeepSpeed file": lambda s, p: torch_save(
        {"module": s, "optimizer": {"state": torch.ones(2)}, "lr": 0.1}, p / "mp_rank_00_model_states.pt"
    ),
    "accelerate's folder": lambda s, p: folder_with(
        p / "step", lambda f: save_file(s, f / "model.safetensors", {"format": "pt"})
    ),
    "a safetensors file": lambda s, p: (
        folder_with(p / "x", lambda f: save_file(s, f / "w.safetensors")) / "w.safetensors"
    ),
    "accelerate's FSDP checkpoint in parts": lambda s, p: folder_with(
        p / "checkpoint-5", lambda f: save_dcp(f / "pytorch_model_fsdp_0", {"model": s})
    ),
    "accelerate's FSDP checkpoint in one file": lambda s, p: folder_with(
        p / "checkpoint-5", lambda f: torch_save(wrapped(s, "_fsdp_wrapped_module"), f / "pytorch_model_fsdp.bin")
    ),
    "a DeepSpeed folder": lambda s, p: zero_folder(p / "checkpoint-5", s),
    "a DCP folder": lambda s, p: save_dcp(p / "dcp", {"model": s, "optimizer": {"m": torch.ones(3), "lr": 0.1}}),
    "a bare DCP folder": lambda s, p: save_dcp(p / "dcp", dict(s)),
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_gives_the_logits_of_the_model_it_was_saved_from(
    form: str, base: Path, state: State, tmp_path: Path
) -> None:
    found = policy(FORMS[form](state, tmp_path), base)
    assert found.state
    assert found.folder == base
    assert found.digest == found.base_digest != source(base).digest
    assert torch.equal(logits(ModelLoader().load(found, Fp32()).model), trained())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("form", ["accelerate's FSDP checkpoint in parts", "a DeepSpeed folder"])
def test_a_trainers_folder_with_a_configuration_needs_no_base(
    form: str, base: Path, state: State, tmp_path: Path
) -> None:
    folder = FORMS[form](state, tmp_path)
    shutil.copy(base / "config.json", folder)
    found = source(folder, allow_pickle=True)
    assert found.state
    assert torch.equal(logits(ModelLoader().load(found, Fp32()).model), trained())
    way_out = "zero_to_fp32.py" if form == "a DeepSpeed folder" else "accelerate merge-weights"
    with pytest.raises(ModelError, match=rf"nothing was opened.*{way_out}") as caught:
        source(folder)
    assert not isinstance(caught.value, HalfWrittenError)


def test_zero_3_is_refused_by_its_name_with_the_command_that_converts_it(
    base: Path, state: State, tmp_path: Path
) -> None:
    folder = zero_folder(tmp_path / "empty", {name: torch.ones(0) for name in state})
    with pytest.raises(ModelError, match=r"in parts in several files: convert it with .*zero_to_fp32\.py") as caught:
        ModelLoader().load(policy(folder, base), Fp32())
    assert not isinstance(caught.value, HalfWrittenError)
    (folder / "global_step10" / ZERO).rename(folder / "global_step10" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(ModelError, match=r"DeepSpeed ZeRO checkpoint whose parameters lie in parts"):
        policy(folder, base)


def test_a_distributed_checkpoint_without_its_parts_is_half_written(base: Path, state: State, tmp_path: Path) -> None:
    folder = save_dcp(tmp_path / "dcp", {"model": state})
    for part in folder.glob("*.distcp"):
        part.unlink()
    with pytest.raises(HalfWrittenError, match=r"but no \*\.distcp files"):
        policy(folder, base)


def test_a_checkpoint_and_its_base_are_two_sets_of_weights(base: Path, state: State, tmp_path: Path) -> None:
    found = policy(torch_save(state, tmp_path / "policy.pt"), base)
    loader = ModelLoader()
    loader.load(source(base), Fp32())
    assert torch.equal(logits(loader.load(found, Fp32()).model), trained())
    assert torch.equal(logits(loader.load(source(base), Fp32()).model), logits(tiny_model()))
    assert loader.bases_read == 3


def test_tensors_that_are_absent_or_left_over_are_listed(base: Path, state: State, tmp_path: Path) -> None:
    gone = state.pop("model.norm.weight")
    found = policy(torch_save({"state": {**state, "value_head.weight": gone}}, tmp_path / "policy.pt"), base)
    with pytest.raises(
        ModelError, match=r"1 missing from the checkpoint \(model\.norm\.weight\); 1 unknown .*value_head"
    ):
        ModelLoader().load(found, Fp32())


def test_a_checkpoint_of_another_architecture_is_refused(base: Path, tmp_path: Path) -> None:
    found = policy(torch_save({"state": {"foo.weight": torch.ones(1)}}, tmp_path / "policy.pt"), base)
    with pytest.raises(ModelError, match=r"holds no tensor that its base's architecture knows .*foo\.weight"):
        ModelLoader().load(found, Fp32())


def test_without_a_base_the_error_says_how_to_name_one(base: Path, state: State, tmp_path: Path) -> None:
    path = torch_save(state, tmp_path / "policy.pt")
    with pytest.raises(ModelError, match="say `base: reference`"):
        policy(path, base, said=None)
    with pytest.raises(ModelError, match="can be a policy with a `base:`"):
        source(path, allow_pickle=True)


@pytest.mark.parametrize("form", ["the reference implementation's folder", "a bare state dict", "a DCP folder"])
def test_pickles_are_refused_unless_they_are_allowed(form: str, base: Path, state: State, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing was opened\. .*--allow-pickle"):
        policy(FORMS[form](state, tmp_path), base, allow_pickle=False)


def test_safetensors_need_no_permission(base: Path, state: State, tmp_path: Path) -> None:
    assert not policy(FORMS["accelerate's folder"](state, tmp_path), base, allow_pickle=False).pickle


def test_a_hostile_state_dict_does_not_run_even_when_pickles_are_allowed(base: Path, tmp_path: Path) -> None:
    path = torch_save({"state": Canary(tmp_path / "canary")}, tmp_path / "policy.pt")
    with pytest.raises(ModelError, match="is not a pickle of tensors alone"):
        ModelLoader().load(policy(path, base), Fp32())
    assert not (tmp_path / "canary").exists()


def test_a_hostile_dcp_metadata_does_not_run_even_when_pickles_are_allowed(
    base: Path, state: State, tmp_path: Path
) -> None:
    folder = save_dcp(tmp_path / "dcp", {"model": state})
    (folder / ".metadata").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with pytest.raises(ModelError, match=r"names posix\.mkdir, which is no part of the format"):
        ModelLoader().load(policy(folder, base), Fp32())
    assert not (tmp_path / "canary").exists()


def test_a_dcp_folder_with_damaged_data_is_one_paragraph(base: Path, state: State, tmp_path: Path) -> None:
    folder = save_dcp(tmp_path / "dcp", {"model": state})
    next(folder.glob("*.distcp")).write_bytes(b"cut")
    found = policy(folder, base)
    with pytest.raises(ModelError, match="could not be read as a distributed checkpoint") as caught:
        ModelLoader().load(found, Fp32())
    assert "\n" not in str(caught.value)


def test_names_are_found_under_the_nesting_that_holds_most_of_them() -> None:
    stored = ["step", "ema.a.w", "model.module.a.w", "model.module.b.w", "model.module.c.new"]
    assert own_names(stored, {"a.w", "b.w"}, Path("x.pt")) == {
        "a.w": "model.module.a.w",
        "b.w": "model.module.b.w",
        "c.new": "model.module.c.new",
    }
