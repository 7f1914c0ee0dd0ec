"""Log-probabilities by content address, shared by runs, models and machines.

    CACHE/logps/v1/<namespace>/namespace.json            what changes a number for given ids, readable
    CACHE/logps/v1/<namespace>/<hint>-<digest>.parquet   one block of entries, in row order, never changed
    CACHE/logps/v1/<namespace>/index/<digest>.sqlite     where keys lie (`key_index`)

An entry only ever answers under the namespace that it was computed in. It need not stay (`gc` may remove it), and
numbers of two namespaces need not be equal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpo_score.errors import DamageError
from dpo_score.storage.base import Store, WarningsTo, log
from dpo_score.storage.cache.blocks import SequenceLogps, from_table, misplaced
from dpo_score.storage.cache.namespace import DESCRIPTION, CacheSpace, CacheView, content_digest_of
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.open import open_store

__all__ = ["CacheSpace", "CacheView", "LogpCache", "Removed", "SequenceLogps", "open_cache"]
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
        found: list[CacheSpace] = []
        for name in sorted({path.split("/")[2] for path in self.store.list(FOLDER)}):
            if namespaces is not None and not any(name.startswith(start) for start in namespaces):
                continue
            description = f"{FOLDER}/{name}/{DESCRIPTION}"
            fields: Any = {}
            with suppress(DamageError):  # `verify` names it; entries do not depend on it
                fields = self.store.read_json(description) if self.store.exists(description) else {}
            known = fields if isinstance(fields, dict) else {}
            found.append(CacheSpace(self.store, f"{FOLDER}/{name}", known, self.warn))
        return tuple(found)

    def ls(self) -> list[dict[str, Any]]:
        """One row a namespace: its digest, files, entries, bytes, time of the newest file, and its fields."""
        rows = []
        for space in self.spaces():
            files = space.snapshot()
            stats = [stat for file in files if (stat := self.store.stat(f"{space.folder}/{file}")) is not None]
            newest = max((stat.modified for stat in stats), default=0.0)
            rows.append(
                {
                    "namespace": space.name,
                    "files": len(stats),
                    "entries": sum(len(keys) for file in files if (keys := space.keys(file)) is not None),
                    "bytes": sum(stat.size for stat in stats),
                    "newest": datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
                    "fields": dict(space.fields),
                }
            )
        return rows

    def file_count(self) -> int:
        """Value files of all namespaces."""
        return sum(len(space.snapshot()) for space in self.spaces())

    def verify(self, read: Callable[[int], None] = lambda files: None) -> tuple[str, ...]:
        """One sentence per damaged file; nothing is moved or changed. `read`: told of each value file that was read."""
        found: list[str] = []
        for space in self.spaces():
            for file in space.snapshot():
                if text := self._damage(f"{space.folder}/{file}"):
                    found.append(text)
                read(1)
            if digest(space.fields)[:DIGEST_CHARACTERS] != space.name:
                found.append(f"{self.store.url(space.folder)}/{DESCRIPTION}: does not describe this namespace")
            found += space.damaged_indexes()
        return tuple(found)

    def _damage(self, name: str) -> str | None:
        """What is wrong with a value file, None where nothing is."""
        url = self.store.url(name)
        try:
            table = self.store.read_table(name)
            if reason := misplaced(table.schema.metadata, name):
                return f"{url}: {reason}"
            block = from_table(table, url)
        except DamageError as error:
            return str(error)
        whole = block.content_digest == content_digest_of(name)
        return None if whole else f"{url}: its contents are not those that its name promises"

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
        names = [f"{space.folder}/{file}" for space in spaces for file in space.snapshot()]
        stats = ((name, stat) for name in names if (stat := self.store.stat(name)) is not None)
        files = sorted((stat.modified, stat.size, name) for name, stat in stats)
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
            if space.snapshot():
                space.compact()
                continue
            for name in self.store.list(space.folder):  # what is left of an empty namespace
                self.store.remove(name)
        return Removed(len(gone), sum(size for _, size in gone))
