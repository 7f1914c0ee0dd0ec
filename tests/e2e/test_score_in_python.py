"""The example scripts run as they stand, on tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]


def printed(script: str, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DPO_SCORE_CACHE_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(folder / "datasets"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "pipelines" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_script_prints_three_tables(tmp_path: Path) -> None:
    models = [str(save_tiny(tmp_path / name, seed=seed)) for seed, name in enumerate(("reference", "policy"))]
    shown = printed("score_in_python.py", tmp_path, *models)
    assert shown.count("shape: (3,") == 2
    assert "shape: (2, 3)" in shown
    assert "null_field" in shown


def test_metrics_are_logged_while_a_model_trains(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    shown = printed("metrics_while_training.py", tmp_path, str(save_tiny(tmp_path / "model")), "2")
    lines = [line for line in shown.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    assert all("of 8 pairs" in line for line in lines)
    assert lines[0].split(":")[1] != lines[1].split(":")[1]
