"""A glob of checkpoints: which paths are checkpoints, in which order, and what each is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_score.config.checkpoint_glob import expanded, is_state_name, policy_stem
from dpo_score.config.load import load_config
from dpo_score.errors import ConfigError


def swept(root: Path, pattern: str, *paths: str, key: str = "model") -> dict[str, str]:
    """Name of the policy → path below `root`, after `paths` were made: a path with a suffix is a file."""
    for path in paths:
        whole = root / path
        (whole.parent if whole.suffix else whole).mkdir(parents=True, exist_ok=True)
        if whole.suffix:
            whole.touch()
    found = expanded({"name": "p", key: f"{root}/{pattern}", "base": "reference"})
    assert all((policy["base"], policy["glob"]) == ("reference", f"{root}/{pattern}") for policy in found)
    return {policy["name"]: str(Path(policy[key]).relative_to(root)) for policy in found}


def test_folders_in_natural_order(tmp_path: Path) -> None:
    names = swept(tmp_path, "checkpoint-*", "checkpoint-10", "checkpoint-9", "checkpoint-100", "checkpoint-last")
    assert list(names) == ["p-9", "p-10", "p-100", "p-checkpoint-last"]


def test_a_decimal_is_no_step(tmp_path: Path) -> None:
    for name in ("beta-0.05", "beta-0.5"):
        (tmp_path / name).mkdir()
    assert set(swept(tmp_path, "*", "lr-5e-7", "step-7")) == {"p-beta-0.05", "p-beta-0.5", "p-lr-5e-7", "p-7"}


def test_files_are_named_by_their_own_step(tmp_path: Path) -> None:
    names = swept(tmp_path, "v2/*", "v2/step-9.pt", "v2/step-10.safetensors", "v2/best.pth", "v2/notes.txt")
    assert names == {"p-best": "v2/best.pth", "p-9": "v2/step-9.pt", "p-10": "v2/step-10.safetensors"}


def test_files_without_a_step_are_named_by_their_folder(tmp_path: Path) -> None:
    names = swept(tmp_path, "*/policy.pt", "step-10/policy.pt", "step-9/policy.pt", "LATEST/policy.pt", "step-11")
    assert list(names) == ["p-LATEST", "p-9", "p-10"]
    assert swept(tmp_path, "step-*/*.pt") == {"p-9": "step-9/policy.pt", "p-10": "step-10/policy.pt"}


@pytest.mark.parametrize(
    ("pattern", "paths", "names"),
    [
        ("step-*/*.pt", ("step-1/a.pt", "step-1/b.pt"), ["p-step-1-a.pt", "p-step-1-b.pt"]),
        ("step-*", ("step-1", "step-1.pt", "step-2"), ["p-step-1", "p-step-1.pt", "p-step-2"]),
        ("*/step-*", ("a/step-1", "b/step-1"), ["p-a-step-1", "p-b-step-1"]),
    ],
)
def test_names_are_unique(tmp_path: Path, pattern: str, paths: tuple[str, ...], names: list[str]) -> None:
    assert list(swept(tmp_path, pattern, *paths)) == names


def test_beside_folders_the_files_of_the_last_save_are_no_checkpoints(tmp_path: Path) -> None:
    """A trainer saves its final model into the folder that holds the checkpoints."""
    beside = ("model.safetensors", "adapter_model.safetensors", "training_args.bin", "pytorch_model.bin")
    assert list(swept(tmp_path, "*", "checkpoint-1", "checkpoint-2", *beside)) == ["p-1", "p-2"]


def test_adapters_are_folders(tmp_path: Path) -> None:
    assert list(swept(tmp_path, "step-*", "step-1", "step-2.pt", key="adapter")) == ["p-1"]


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "optimizer_1.bin",
        "scheduler.bin",
        "rng_state_0.pth",
        "random_states_0.pkl",
        "training_args.bin",
        "adapter_model.bin",
        "model-00001-of-00002.safetensors",
        "config.json",
        "policy.pt.tmp",
    ],
)
def test_files_that_are_no_checkpoint(name: str, tmp_path: Path) -> None:
    assert not is_state_name(name)
    with pytest.raises(ConfigError, match=r"no folder matches .*, and no file of weights does \(.bin, .*.pt"):
        swept(tmp_path, "*/*", f"step-1/{name}")


@pytest.mark.parametrize("pattern", ["x*\0", f"{'y' * 6000}*", "[a"])
def test_a_pattern_that_can_match_nothing(pattern: str) -> None:
    with pytest.raises(ConfigError, match="policy 'p': no folder matches"):
        expanded({"name": "p", "model": pattern})


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/step-*/policy.pt", "step"),
        ("runs/step-10/policy.pt", "step-10"),
        ("runs/checkpoint-5/model.safetensors", "checkpoint-5"),
        ("runs/mine.pt", "mine.pt"),
        ("runs/*/policy.pt", "policy"),
        ("policy.pt", "policy"),
        ("runs/checkpoint-5", "checkpoint-5"),
    ],
)
def test_a_file_whose_name_many_checkpoints_share_is_called_by_its_folder(path: str, name: str) -> None:
    assert policy_stem(path) == name


def test_a_glob_without_a_name_takes_the_folders_name(tmp_path: Path) -> None:
    for step in (9, 10):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}/policy.pt").touch()
    config = load_config(None, {"policy": [f"{tmp_path}/step-*/policy.pt"], "data": ["x.jsonl"]}, environment={})
    assert [policy.name for policy in config.policies] == ["step-9", "step-10"]
