"""One folder that holds both a data set with reference values and the scores of a run: neither spoils the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_score.config.load import load_config
from dpo_score.engine import run as local
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError
from dpo_score.results.verify.verify import verify
from dpo_score.storage.manifest import MANIFEST, MANIFEST_COPY
from tests.exported import export, text_rows, write_rows
from tests.tiny import save_tiny

Shared = tuple[Path, tuple[Path, Path], Path]
"""Data, models, OUT."""


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def scored_beside(data: Path, models: tuple[Path, Path], out: Path, **options: Any) -> Any:
    settings = {"data": [str(data)], "reference": str(models[0]), "policy": [f"p={models[1]}"], "out": str(out)}
    settings |= {"path": "plain", "threads": 1, "cache_dir": str(out.parent / "cache"), "max_length": 1024}
    restart = bool(options.pop("restart", False))
    return local.run(load_config(None, {**settings, **options}, {}), Progress(quiet=True), restart=restart)


@pytest.fixture
def shared_folder(tmp_path: Path) -> Shared:
    """A data set, and the scores of a policy in the same folder."""
    models = save_tiny(tmp_path / "m0", seed=0), save_tiny(tmp_path / "m1", seed=1)
    data = write_rows(tmp_path / "d.parquet", text_rows(5))
    export(data, models[0], tmp_path / "out")
    scored_beside(data, models, tmp_path / "out")
    return data, models, tmp_path / "out"


def test_the_card_of_a_shared_folder_describes_both(shared_folder: Shared, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    _, _, out = shared_folder
    for name in ("default", "p"):
        assert len(datasets.load_dataset(str(out), name, split="train", cache_dir=str(tmp_path / "hf"))) == 5
    card = (out / "README.md").read_text()
    assert "# Preference scores" in card
    assert "# Preference data with reference log-probabilities" in card


def test_both_commands_again_change_nothing_in_a_shared_folder(shared_folder: Shared) -> None:
    data, models, out = shared_folder
    before = files_of(out)
    export(data, models[0], out)
    scored_beside(data, models, out)
    after = files_of(out)
    dated = {MANIFEST, MANIFEST_COPY, "report.html"}  # which say when the folder was last worked on
    assert {name for name in before | after if before.get(name) != after.get(name)} <= dated
    assert verify(str(out)).damage == []


def test_damage_to_the_data_set_of_a_shared_folder_is_found(shared_folder: Shared) -> None:
    _, _, out = shared_folder
    name = "data/train-00000-of-00001.parquet"
    (out / name).write_bytes((out / name).read_bytes() + b" ")
    assert [found for found, _ in verify(str(out)).damage] == [name]


def test_a_shared_folder_is_not_half_deleted(shared_folder: Shared) -> None:
    data, models, out = shared_folder
    before = files_of(out)
    with pytest.raises(ConfigError, match="also holds a data set"):
        scored_beside(data, models, out, restart=True)
    with pytest.raises(ConfigError, match="holds the scores of a run"):
        export(data, models[0], out, restart=True)
    assert files_of(out) == before
