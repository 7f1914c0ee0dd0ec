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
        for _ in range(ATTEMPTS):
            before = _state(real)
            known = self._known(real, before)
            if known is not None:
                return known
            found = _hashed(real, self._check)
            if _state(real) == before:
                self._remember(real, before, found)
                return found
        raise StorageError(f"{real} keeps changing while it is read; wait until it is written, then run again")

    def _known(self, path: str, state: dict[str, Any]) -> str | None:
        name = _name(path)
        if not self._store.exists(name):
            return None
        try:
            entry = self._store.read_json(name)
        except DamageError:
            return None  # hashed and written anew
        known = isinstance(entry, dict) and {key: entry.get(key) for key in state} == state
        return str(entry["sha256"]) if known and entry.get("checksum") == _checksum(entry) else None

    def _remember(self, path: str, state: dict[str, Any], sha256: str) -> None:
        if "mtime_ns" in state and time.time_ns() - max(state["mtime_ns"], state["ctime_ns"]) < SETTLED_NS:
            return
        entry = {**state, "sha256": sha256}
        self._store.write_json(_name(path), {**entry, "checksum": _checksum(entry)})


def _is_url(path: str | Path) -> bool:
    return isinstance(path, str) and "://" in path


def _name(path: str) -> str:
    return f"{FOLDER}/{digest(path)[:32]}.json"


def _checksum(entry: dict[str, Any]) -> str:
    return digest({key: value for key, value in entry.items() if key != "checksum"})


def _state(path: str) -> dict[str, Any]:
    if _is_url(path):
        return _object_state(path)
    with translated(path):
        found = Path(path).stat()
    times = {"mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
    return {"path": path, "size": found.st_size, "inode": found.st_ino, **times}


def _object_state(url: str) -> dict[str, Any]:
    """One request; never from a listing that was kept."""
    with translated_remote(url):
        fs, root = _opened(url)
        found = fs.info(root)
    return {"path": url, "size": found.get("size"), "version": hashlib.sha256(repr(found).encode()).hexdigest()}


def _opened(url: str) -> tuple[Any, str]:
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return fs, str(root)


def _hashed(path: str, check: Callable[[], object]) -> str:
    found = hashlib.sha256()
    with translated_remote(path), _open(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            check()
            found.update(chunk)
    return found.hexdigest()


def _open(path: str) -> Any:
    if not _is_url(path):
        return Path(path).open("rb")
    fs, root = _opened(path)
    return fs.open(root, "rb")
