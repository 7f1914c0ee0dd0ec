"""sha256 of large files, remembered, so that a second run reads no weights.

    CACHE/file-digests/<digest of the path>.json   {path, size, mtime_ns, ctime_ns, inode, sha256}

A remembered digest is used only while all of these are as they were when the file was read. A file changed within
the last seconds is not remembered, since a second change could leave no trace in its times.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from dpo_score.errors import DamageError, StorageError
from dpo_score.store.faults import translated
from dpo_score.store.identity import digest
from dpo_score.store.storage import open_store

FOLDER = "file-digests"
SETTLED_NS = 2_000_000_000
ATTEMPTS = 2


class FileDigests:
    """Digests of local files, kept under the cache folder."""

    def __init__(self, cache_root: str | Path) -> None:
        self._store = open_store(cache_root)

    def sha256(self, path: str | Path) -> str:
        """The sha256 of a file in hexadecimal. StorageError when it cannot be read or changes while it is."""
        real = Path(os.path.realpath(path))
        for _ in range(ATTEMPTS):
            before = _state(real)
            known = self._known(real, before)
            if known is not None:
                return known
            found = _hashed(real)
            if _state(real) == before:
                self._remember(real, before, found)
                return found
        raise StorageError(f"{real} keeps changing while it is read; wait until it is written, then run again")

    def _known(self, path: Path, state: dict[str, Any]) -> str | None:
        name = _name(path)
        if not self._store.exists(name):
            return None
        try:
            entry = self._store.read_json(name)
        except DamageError:
            return None  # hashed and written anew
        known = isinstance(entry, dict) and {key: entry.get(key) for key in state} == state
        return str(entry["sha256"]) if known and entry.get("checksum") == _checksum(entry) else None

    def _remember(self, path: Path, state: dict[str, Any], sha256: str) -> None:
        if time.time_ns() - max(state["mtime_ns"], state["ctime_ns"]) < SETTLED_NS:
            return
        entry = {**state, "sha256": sha256}
        self._store.write_json(_name(path), {**entry, "checksum": _checksum(entry)})


def _name(path: Path) -> str:
    return f"{FOLDER}/{digest(str(path))[:32]}.json"


def _checksum(entry: dict[str, Any]) -> str:
    return digest({key: value for key, value in entry.items() if key != "checksum"})


def _state(path: Path) -> dict[str, Any]:
    with translated(path):
        found = path.stat()
    times = {"mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
    return {"path": str(path), "size": found.st_size, "inode": found.st_ino, **times}


def _hashed(path: Path) -> str:
    with translated(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
