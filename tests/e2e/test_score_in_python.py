"""The example script runs as it stands, on tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import save_tiny

ROOT = Path(__file__).parents[2]


def test_the_script_prints_three_tables(tmp_path: Path) -> None:
    models = [str(save_tiny(tmp_path / name, seed=seed)) for seed, name in enumerate(("reference", "policy"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DPO_SCORE_CACHE_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "pipelines" / "score_in_python.py"), *models]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shape: (3,") == 2
    assert "shape: (2, 3)" in done.stdout
    assert "null_field" in done.stdout
