"""Models from the hub: their commits are noted, and stand in the pipeline file in place of branches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_score.config.load import load_config
from dpo_score.results.run_folder import open_out
from dpo_score.results.source_text import stored_config
from dpo_score.storage.manifest import Manifest
from tests.models.hub_stand_in import COMMIT
from tests.models.model_folders import save_adapter
from tests.models.test_locate import cache_repository
from tests.run_fixtures import Runner, preference_rows, write_rows
from tests.tiny import save_tiny

OTHER = "f" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache, offline, with a base `org/base` and an adapter `org/adapter` over it."""
    pytest.importorskip("peft")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = save_tiny(tmp_path / "base")
    cache_repository(tmp_path / "hub", "org/base", base)
    adapter = save_adapter(tmp_path / "adapter", base)
    cache_repository(tmp_path / "hub", "org/adapter", adapter, OTHER)
    return tmp_path / "hub"


def finished(runner: Runner, folder: Path, **options: Any) -> Manifest:
    data = write_rows(folder / "d.parquet", preference_rows(3))
    runner(data, folder / "out", path="plain", **options)
    return open_out(str(folder / "out"))[1]


def test_commits_of_base_and_adapter_are_noted(hub: Path, runner: Runner, tmp_path: Path) -> None:
    policy = ["worn=org/adapter", f"local={runner.models['better']}"]
    manifest = finished(runner, tmp_path, reference="org/base", policy=policy, policy_base="reference")
    assert manifest.notes["commits"] == {"reference": {"model": COMMIT}, "worn": {"model": COMMIT, "adapter": OTHER}}


def test_the_pipeline_file_names_commits(hub: Path, runner: Runner, tmp_path: Path) -> None:
    policy = ["worn=org/adapter", "both=org/base+org/adapter", "full=org/base", f"local={runner.models['better']}"]
    finished(runner, tmp_path, reference="org/base", reference_revision="main", policy=policy, policy_base="reference")
    config = stored_config(open_out(str(tmp_path / "out"))[0])
    assert config.reference is not None
    assert config.reference.revision == COMMIT
    found = {policy.name: policy.revision for policy in config.policies}
    assert found == {"worn": OTHER, "both": COMMIT, "full": COMMIT, "local": None}
    again = load_config(str(tmp_path / "out/pipeline.yaml"), {}, environment={})
    assert again == config


def test_names_of_policies_that_came_later_are_noted(runner: Runner, tmp_path: Path) -> None:
    finished(runner, tmp_path)
    manifest = finished(runner, tmp_path, policy=[f"late={runner.models['worse']}"])
    assert set(manifest.notes["names"]) == {"reference", "better", "late"}
