"""Model folders to read, to damage and to put an adapter over."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.models.model_folders import save_adapter
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A fresh copy of one tiny model folder, free to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", saved)
