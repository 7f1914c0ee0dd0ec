"""`load_dataset(OUT, "<policy>")` reads a run's folder by the card that the run wrote."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from tests.engine.whole_runs.small_run import small_run

datasets = pytest.importorskip("datasets")


def test_every_policy_is_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    datasets.disable_progress_bars()
    out = small_run().out
    assert datasets.get_dataset_config_names(str(out)) == ["step-10", "step-20", "step-30"]
    loaded = datasets.load_dataset(str(out), "step-20", split="train", cache_dir=str(tmp_path))
    stored = pl.read_parquet(out / "scores" / "step-20" / "*.parquet")
    assert loaded.column_names == stored.columns
    assert loaded["row_id"][:] == stored["row_id"].to_list()
    assert loaded["margins"][:] == stored["margins"].to_list()
