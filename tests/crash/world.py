"""One small job, run again and again in the same place: two policies over 80 rows in four blocks."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_score.storage.commits import CommitRecord, read_record, record_stage
from dpo_score.storage.local import LocalStore
from dpo_score.storage.manifest import read_manifest
from dpo_score.storage.resume import FileState, file_states

ROOT = Path(__file__).parents[2]
ROWS = 80
RESULTS = ("scores", "reference", "rejects", "summary.json", "README.md", "pipeline.yaml")
UNCOMMITTED = 2
"""Blocks of which values may be computed and not committed: the one being written, and the one after it."""
BAD = {7: {"chosen": None}, 55: {"prompt": None}, 79: {"rejected": None}}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended: exit code, or minus the signal; the primitives it called; what it said."""

    status: int
    calls: Sequence[str]
    errors: str
    strays: Sequence[str]


@dataclass
class World:
    """Data, models and folders under `folder`, and the process that forks the children."""

    folder: Path
    _server: subprocess.Popen[str] | None = field(default=None)

    def __post_init__(self) -> None:
        from tests.tiny import save_tiny

        self.folder.mkdir(parents=True, exist_ok=True)
        for seed, name in enumerate(("reference", "better", "worse")):
            save_tiny(self.folder / name, seed=seed)
        pq.write_table(pa.Table.from_pylist(rows()), self.folder / "pairs.parquet")

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.out)

    def argv(self, *more: str) -> list[str]:
        policies = [f"--policy={name}={self.folder / name}" for name in ("better", "worse")]
        given = [
            "run",
            f"--data={self.folder / 'pairs.parquet'}",
            f"--reference={self.folder / 'reference'}",
            *policies,
        ]
        return [*given, f"--out={self.out}", f"--cache-dir={self.cache}", "--path=plain", "--quiet", *more]

    def clean(self) -> None:
        """As before the first run: the cache too, since what it held at the start is part of the promise."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)

    def run(
        self, *more: str, watch: bool = False, record: Path | None = None, kill_after: float | None = None, **fault: Any
    ) -> Ended:
        watched = [str(self.out), str(self.cache)] if watch else []
        job = {
            "argv": self.argv(*more), "fault": fault, "watch": watched, "record": record and str(record),
            "kill_after": kill_after,
        }  # fmt: skip
        server = self._started()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return Ended(**json.loads(server.stdout.readline()))

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None:
            command = [sys.executable, "-m", "tests.crash.forkserver"]
            self._server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self._server.stdout is not None
            assert self._server.stdout.readline() == "ready\n"
        return self._server

    def close(self) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            self._server.stdin.close()
            self._server.wait(60)
            self._server.stdout.close()

    def hashes(self) -> dict[str, str]:
        """sha256 of everything a user reads."""
        kept = [name for name in self.store.list() if name.split("/")[0] in RESULTS]
        return {name: self.store.sha256(name) for name in kept}

    def committed(self) -> dict[str, CommitRecord]:
        names = [name for name in self.store.list("commits") if record_stage(name)]
        found = {name: read_record(self.store, name) for name in names}
        broken = [name for name, record in found.items() if not isinstance(record, CommitRecord)]
        assert broken == [], f"records that do not hold: {broken}"
        return {name: record for name, record in found.items() if isinstance(record, CommitRecord)}

    def check_invariants(self) -> None:
        """What holds at every moment: final names are whole, records tell the truth, and few blocks lack theirs."""
        for name in self.store.list():
            if name.endswith(".parquet"):
                self.store.read_table(name)
            elif name.endswith(".json"):
                self.store.read_json(name)
        if self.store.exists("manifest.json"):
            manifest = read_manifest(self.store)
            assert manifest is not None
            assert manifest.warnings == ()
        committed = self.committed()
        for name, record in committed.items():
            assert set(file_states(self.store, record)) <= {FileState.SOUND}, name
        computed = list(self.cache.glob("logps/*/*/*.parquet"))
        assert len(computed) <= len(committed) + UNCOMMITTED, "a kill has cost more blocks"

    def identity_of_files(self) -> dict[str, tuple[int, int]]:
        """(inode, time of change) of every committed file: a file computed again would have others."""
        names = [file.name for record in self.committed().values() for file in record.files]
        stats = {name: self.store.path(name).stat() for name in names}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def rows() -> list[dict[str, Any]]:
    """Rows of a few words; three cannot be scored."""
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choice("abc def") for _ in range(draw.randint(1, 12))) + "."

    made = [{"prompt": f"{i} {text()}", "chosen": " " + text(), "rejected": " " + text()} for i in range(ROWS)]
    return [{**row, **BAD.get(i, {})} for i, row in enumerate(made)]
