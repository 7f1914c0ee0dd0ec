"""`python -m tests.data.compat.make v1`: a finished run and its cache as this release writes them, to be read for ever.

Run once per schema version, when a release is made. Nothing of this machine is in it: names are relative.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from dpo_score.config.load import load_config
from dpo_score.engine import prepare
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from tests.run_fixtures import preference_rows, write_rows
from tests.tiny import save_tiny

HERE = Path(__file__).parent
LEFT_OUT = shutil.ignore_patterns(".work", "report.html", "audit.parquet", "index", "*.lock")


def make(version: str) -> None:
    """Six rows, one of them bad; a reference and a policy of two tiny layers."""
    prepare.host = lambda: "golden"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for seed, name in enumerate(("reference", "better")):
            save_tiny(Path(name), seed=seed, hidden_size=16, intermediate_size=16)
        rows = preference_rows(6)
        rows[2]["chosen"] = None
        write_rows(Path("pairs.parquet"), rows)
        given = {"reference": "reference", "policy": ["better=better"], "path": "plain", "threads": 1, "beta": 0.2}
        where = {"data": ["pairs=pairs.parquet"], "out": "out", "cache_dir": "cache"}
        run(load_config(None, {**given, **where}, environment={}), Progress(quiet=True))
        for name in ("out", "cache/logps"):
            shutil.copytree(name, HERE / version / name, ignore=LEFT_OUT, dirs_exist_ok=True)
        shutil.copy("pairs.parquet", HERE / version)
        os.chdir(HERE)


if __name__ == "__main__":
    make(sys.argv[1])
