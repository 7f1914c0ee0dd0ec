"""sha256 of large files, remembered, so that a second run reads no weights.

    CACHE/file-digests/<digest of the path>.json   {path, size, mtime_ns, ctime_ns, inode, sha256}
                                                   {path, size, version, sha256} of an object behind a URL

A remembered digest is used only while all of these are as they were when the file was read. A file changed within
the last seconds is not remembered, since a second change could leave no trace in its times. `version` is a digest of
what the object store tells of an object: its ETag, its time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from dpo_score.errors import DamageError, StorageError
from dpo_score.escape import without_secrets
from dpo_score.storage.faults import translated, translated_remote
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.open import open_store

FOLDER = "file-digests"
SETTLED_NS = 2_000_000_000
ATTEMPTS = 2
CHUNK_BYTES = 1 << 20


class FileDigests:
    """Digests of files, kept under the cache folder of this machine.

    `check` is called between chunks of a file that has to be read; what it raises ends that.
    """

    def __init__(self, cache_root: str | Path, check: Callable[[], object] = lambda: None) -> None:
        self._store, self._check = open_store(cache_root), check

    def sha256(self, path: str | Path) -> str:
        """The sha256 of a file or URL in hexadecimal. StorageError when it cannot be read or changes while it is."""
        real = str(path) if _is_url(path) else os.path.realpath(path)
        name = f"{FOLDER}/{digest(real)[:32]}.json"
        for _ in range(ATTEMPTS):
            before = _state(real)
            known = self._known(name, before)
            if known is not None:
                return known
            found = _hashed(real, self._check)
            if _state(real) != before:
                continue
            settled = time.time_ns() - max(before.get("mtime_ns", 0), before.get("ctime_ns", 0)) >= SETTLED_NS
            if settled:
                entry = {**before, "sha256": found}
                self._store.write_json(name, {**entry, "checksum": digest(entry)})
            return found
        raise StorageError(f"{real} keeps changing while it is read; wait until it is written, then run again")

    def _known(self, name: str, state: dict[str, Any]) -> str | None:
        """The remembered digest of a file in this state, None where none holds."""
        try:
            entry = self._store.read_json(name) if self._store.exists(name) else None
        except DamageError:
            return None  # hashed and written anew
        if not isinstance(entry, dict) or {key: entry.get(key) for key in state} != state:
            return None
        sound = entry.get("checksum") == digest({key: value for key, value in entry.items() if key != "checksum"})
        return str(entry["sha256"]) if sound else None


def _is_url(path: str | Path) -> bool:
    return isinstance(path, str) and "://" in path


def _state(path: str) -> dict[str, Any]:
    """What tells whether a file is still the one that was hashed: one look, for a URL one request and no listing."""
    if _is_url(path):
        with translated_remote(path):
            fs, root = fsspec.core.url_to_fs(path, use_listings_cache=False)
            found = fs.info(root)
        return {
            "path": without_secrets(path),
            "size": found.get("size"),
            "version": hashlib.sha256(repr(found).encode()).hexdigest(),
        }
    with translated(path):
        stat = Path(path).stat()
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    return {"path": path, "size": stat.st_size, "inode": stat.st_ino, **times}


def _hashed(path: str, check: Callable[[], object]) -> str:
    found = hashlib.sha256()
    with (
        translated_remote(path),
        fsspec.open(path, "rb", use_listings_cache=False) if _is_url(path) else Path(path).open("rb") as file,
    ):
        while chunk := file.read(CHUNK_BYTES):
            check()
            found.update(chunk)
    return found.hexdigest()
