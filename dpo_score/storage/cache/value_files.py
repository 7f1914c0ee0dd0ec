"""Entries out of value files by row, with few files open and only the row groups that are asked for in memory.

Promises: an entry is returned only when its key is the one asked for and its row matches its checksum; a file
where that fails is reported once through `set_aside` and answers nothing more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_score.errors import DamageError, StorageError
from dpo_score.storage.base import Store
from dpo_score.storage.cache.blocks import CacheEntry, entry_at, from_table

OPEN_FILES = 16
GROUPS_AT_ONCE = 64


class ValueFiles:
    """The value files of one namespace, opened on demand."""

    def __init__(self, store: Store, folder: str, set_aside: Callable[[str, DamageError], None]) -> None:
        self._store, self._folder, self._set_aside = store, folder, set_aside
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._broken: set[str] = set()

    def read(self, spots: Mapping[bytes, tuple[str, int]]) -> dict[bytes, CacheEntry]:
        """The entries at (file, row); a key whose file is gone or damaged is left out."""
        by_file: dict[str, dict[int, bytes]] = {}
        for key, (file, row) in spots.items():
            by_file.setdefault(file, {})[row] = key
        found: dict[bytes, CacheEntry] = {}
        for file in sorted(by_file.keys() - self._broken):
            found |= self._from_file(file, by_file[file])
        return found

    def _from_file(self, file: str, keys: Mapping[int, bytes]) -> dict[bytes, CacheEntry]:
        name = f"{self._folder}/{file}"
        try:
            return dict(self._rows(name, keys))
        except DamageError as error:
            self._give_up(file)
            self._set_aside(name, error)
        except StorageError:
            if self._store.exists(name):
                raise
            self._give_up(file)  # removed by another process (gc, quarantine): its entries are misses
        return {}

    def _give_up(self, file: str) -> None:
        self._broken.add(file)
        opened = self._open.pop(f"{self._folder}/{file}", None)
        if opened is not None:
            opened.close()

    def _rows(self, name: str, keys: Mapping[int, bytes]) -> Iterator[tuple[bytes, CacheEntry]]:
        """Entries of some rows of one file, a few row groups at a time."""
        file = self._opened(name)
        starts = _group_starts(file)
        rows = np.array(sorted(keys), np.int64)
        groups = np.searchsorted(starts, rows, side="right") - 1
        needed = np.unique(groups)
        for first in range(0, len(needed), GROUPS_AT_ONCE):
            part = needed[first : first + GROUPS_AT_ONCE]
            within = rows[np.isin(groups, part)]
            yield from self._from_groups(name, part.tolist(), starts, {int(row): keys[int(row)] for row in within})

    def _from_groups(
        self, name: str, groups: Sequence[int], starts: Any, keys: Mapping[int, bytes]
    ) -> Iterator[tuple[bytes, CacheEntry]]:
        with self._store.reading(name):
            table = self._opened(name).read_row_groups(groups, use_threads=False)
        block = from_table(table, self._store.url(name))
        rows = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in groups])
        place = {int(row): i for i, row in enumerate(rows)}
        for row, key in keys.items():
            if block.keys[place[row]].tobytes() != key:
                raise DamageError(f"{self._store.url(name)}: row {row} holds another sequence than its index says")
            yield key, entry_at(block, place[row])

    def _opened(self, name: str) -> Any:
        if name not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[name] = self._store.open_table(name)
        self._open.move_to_end(name)
        return self._open[name]


def _group_starts(file: Any) -> Any:
    """The first row of each row group, and the number of rows."""
    metadata = file.metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
