"""Log-probabilities by content address, shared by runs, models and machines.

    CACHE/logps/v1/<namespace>/namespace.json            what changes a number for given ids, readable
    CACHE/logps/v1/<namespace>/<hint>-<digest>.parquet   one block of entries, in row order, never changed
    CACHE/logps/v1/<namespace>/index/<digest>.sqlite     where keys lie (`key_index`)

Promises: an entry is only ever answered under the namespace it was computed in (the rest: `space`).
Not promised: that an entry stays (`gc` may remove it), or numbers equal across namespaces.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpo_score.errors import DamageError
from dpo_score.storage.base import Store, WarningsTo, log
from dpo_score.storage.cache.blocks import CacheEntry, from_table, misplaced
from dpo_score.storage.cache.namespace import DESCRIPTION, CacheSpace, CacheView, content_digest_of
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.open import open_store

__all__ = ["CacheEntry", "CacheSpace", "CacheView", "LogpCache", "Removed", "open_cache"]
FOLDER = "logps/v1"
DIGEST_CHARACTERS = 32


def open_cache(root: str | Path, warnings_to: WarningsTo = log.warning) -> LogpCache:
    """The cache at a folder or fsspec URL; nothing is created before the first entry."""
    store = open_store(root, warnings_to)
    store.sweep()
    return LogpCache(store, warnings_to)


@dataclass(frozen=True, slots=True)
class Removed:
    """What `gc` took away."""

    files: int
    bytes: int


class LogpCache:
    """All namespaces under one root."""

    def __init__(self, store: Store, warnings_to: WarningsTo = log.warning) -> None:
        self.store = store
        self.warn = warnings_to

    def namespace(self, fields: Mapping[str, Any]) -> CacheSpace:
        """The space of everything that changes a number for given ids: weights, dtype, path, kernel, device kind."""
        return CacheSpace(self.store, f"{FOLDER}/{digest(fields)[:DIGEST_CHARACTERS]}", fields, self.warn)

    def spaces(self, namespaces: Sequence[str] | None = None) -> tuple[CacheSpace, ...]:
        """The namespaces there are; only those whose digests begin with one of `namespaces`, if given."""
        found = sorted({name.split("/")[2] for name in self.store.list(FOLDER)})
        asked = [n for n in found if namespaces is None or any(n.startswith(start) for start in namespaces)]
        return tuple(CacheSpace(self.store, f"{FOLDER}/{n}", self._fields(n), self.warn) for n in asked)

    def _fields(self, namespace: str) -> Mapping[str, Any]:
        name = f"{FOLDER}/{namespace}/{DESCRIPTION}"
        try:
            found = self.store.read_json(name) if self.store.exists(name) else {}
        except DamageError:
            return {}  # `verify` names it; entries do not depend on it
        return found if isinstance(found, dict) else {}

    def ls(self) -> list[dict[str, Any]]:
        """One row a namespace: its digest, files, entries, bytes, time of the newest file, and its fields."""
        return [self._described(space) for space in self.spaces()]

    def _described(self, space: CacheSpace) -> dict[str, Any]:
        entries = sum(len(keys) for file in space.snapshot() if (keys := space.keys(file)) is not None)
        stats = [stat for file in space.snapshot() if (stat := self.store.stat(f"{space.folder}/{file}")) is not None]
        newest = max((stat.modified for stat in stats), default=0.0)
        return {
            "namespace": space.folder.rpartition("/")[2],
            "files": len(stats),
            "entries": entries,
            "bytes": sum(stat.size for stat in stats),
            "newest": datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
            "fields": dict(space.fields),
        }

    def verify(self) -> tuple[str, ...]:
        """One sentence per damaged file; nothing is moved or changed."""
        return tuple(text for space in self.spaces() for text in self._damage(space))

    def _damage(self, space: CacheSpace) -> list[str]:
        found = [text for file in space.snapshot() if (text := self._file_damage(f"{space.folder}/{file}"))]
        if digest(space.fields)[:DIGEST_CHARACTERS] != space.folder.rpartition("/")[2]:
            found.append(f"{self.store.url(space.folder)}/{DESCRIPTION}: does not describe this namespace")
        return found + space.damaged_indexes()

    def _file_damage(self, name: str) -> str | None:
        try:
            table = self.store.read_table(name)
            if reason := misplaced(table.schema.metadata, name):
                return f"{self.store.url(name)}: {reason}"
            block = from_table(table, self.store.url(name))
        except DamageError as error:
            return str(error)
        if block.content_digest != content_digest_of(name):
            return f"{self.store.url(name)}: its contents are not those its name stands for"
        return None

    def gc(
        self,
        max_age: float | None = None,
        max_bytes: int | None = None,
        namespaces: Sequence[str] | None = None,
        now: float | None = None,
    ) -> Removed:
        """Remove value files older than `max_age` seconds, then the oldest until `max_bytes` are left.

        Restricted to `namespaces` (beginnings of digests) when given; with neither limit, all of those go.
        Runs that began with a removed file compute its sequences again.
        """
        self.store.sweep()
        spaces = self.spaces(namespaces)
        files = sorted(self._ages(spaces))
        moment = time.time() if now is None else now
        everything = max_age is None and max_bytes is None and namespaces is not None
        left = sum(size for _, size, _ in files)
        gone = []
        for modified, size, name in files:
            too_old = max_age is not None and moment - modified > max_age
            if everything or too_old or (max_bytes is not None and left > max_bytes):
                gone.append((name, size))
                left -= size
        for name, _ in gone:
            self.store.remove(name)
        for space in spaces:
            self._tidy(space)
        return Removed(len(gone), sum(size for _, size in gone))

    def _ages(self, spaces: Sequence[CacheSpace]) -> list[tuple[float, int, str]]:
        names = [f"{space.folder}/{file}" for space in spaces for file in space.snapshot()]
        return [(stat.modified, stat.size, name) for name in names if (stat := self.store.stat(name)) is not None]

    def _tidy(self, space: CacheSpace) -> None:
        """Bring the index up to date, or remove what is left of an empty namespace."""
        if space.snapshot():
            space.compact()
            return
        for name in self.store.list(space.folder):
            self.store.remove(name)
