"""A look ahead leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from dpo_score.engine.dry_run import dry_run, probe
from dpo_score.engine.progress import Progress
from dpo_score.errors import DataError
from tests.run_fixtures import preference_rows, write_rows


def test_no_folder_is_left(runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, there = write_rows(tmp_path / "pairs.parquet", preference_rows(20)), tmp_path / "temporary"
    there.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(there))
    config, progress = runner.config(data, tmp_path / "never"), Progress(quiet=True)
    dry_run(config, progress)
    probe(config, progress, None)
    data.unlink()
    with pytest.raises(DataError):
        dry_run(config, progress)
    assert not list(there.glob("dpo-score-*"))
    assert not (tmp_path / "never").exists()
