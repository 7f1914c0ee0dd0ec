"""One namespace of the cache: adding blocks of entries, finding them again.

A view sees exactly the files of its snapshot. Adding is safe beside other processes and lists the folder once, not
for each block. A damaged file is quarantined with one warning, and its values are computed again. Memory stays flat
however many entries there are. Value files keep the order of rows, so a run over the same data reads them in sequence,
and a snapshot names them for as long as they exist.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_score.errors import DamageError, StorageError
from dpo_score.storage.base import Store, WarningsTo
from dpo_score.storage.cache import key_index
from dpo_score.storage.cache.blocks import (
    NAMESPACE,
    EntryBlock,
    SequenceLogps,
    ValueFiles,
    is_finite,
    keys_of,
    pack,
    to_table,
)
from dpo_score.storage.cache.key_index import KeyIndex
from dpo_score.storage.io import BUFFER_BYTES

DESCRIPTION = "namespace.json"
GROUP_ROWS = 256
UNINDEXED_FILES = 32
INDEX_AT_ONCE = 1 << 21
OUTWEIGHS = 4
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


class CacheSpace:
    """Entries of one namespace. `folder` is its place inside the cache."""

    def __init__(self, store: Store, folder: str, fields: Mapping[str, Any], warnings_to: WarningsTo) -> None:
        self.store, self.warn = store, warnings_to
        self.folder, self.fields = folder, fields
        self._described = False
        self._contents: Contents | None = None
        self._whole: set[str] = set()

    @property
    def name(self) -> str:
        """The digest of `fields`: the last part of the folder's name."""
        return self.folder.rpartition("/")[2]

    def snapshot(self) -> tuple[str, ...]:
        """Names of the value files present now, sorted."""
        found = (name.removeprefix(f"{self.folder}/") for name in self.store.list(self.folder))
        return tuple(name for name in found if "/" not in name and name.endswith(".parquet"))

    def add(self, name_hint: str, entries: Mapping[bytes, SequenceLogps]) -> str | None:
        """Store a block of entries in their order; its file name, None when there was nothing to store.

        Entries that hold a value that is not finite are left out. Equal blocks under one name, from whatever process,
        are one file; under several names they are, unless another process added one after this one had listed.
        """
        kept = {key: entry for key, entry in entries.items() if is_finite(entry)}
        return self.add_block(name_hint, pack(kept)) if kept else None

    def add_block(self, name_hint: str, block: EntryBlock) -> str:
        """`add`, from arrays."""
        if self._contents is None:  # listed once: by the view that a run begins with, else before the first block
            self._contents = Contents(self.snapshot())
        content = block.content_digest
        found = self._contents.find(content)
        if found is not None and self.store.exists(f"{self.folder}/{found}"):
            return found
        if not self._described:  # in words, once
            self.store.write_json(f"{self.folder}/{DESCRIPTION}", self.fields, if_absent=True)
            self._described = True
        name = file_name(_UNSAFE.sub("-", name_hint)[:80] or "block", content)
        metadata = {"dpo_score": "cache 1", NAMESPACE: self.name}
        table = to_table(block)
        self.store.write_tables(f"{self.folder}/{name}", table.schema, [table], metadata, GROUP_ROWS)
        self._contents.add(content, name)
        return name

    def view(self, snapshot: Sequence[str]) -> CacheView:
        """The entries of the files named, whatever has been added since. Files that are gone are said once."""
        listed = self.snapshot()
        present, self._contents = set(listed), Contents(listed)
        gone = sorted(set(snapshot) - present)
        if gone:
            self.warn(
                f"{self.store.url(self.folder)}: {len(gone)} of {len(snapshot)} cache files this run began with are "
                f"gone, the first is {gone[0]}; their sequences are computed again"
            )
        return CacheView(self, frozenset(present.intersection(snapshot)))

    def compact(self) -> None:
        """Index every value file; merge small indexes into large ones, so that their number grows logarithmically."""
        files = set(self.snapshot())
        for name in self.store.list(f"{self.folder}/index"):
            if not name.endswith(key_index.SUFFIX):
                self.store.remove(name)  # of an earlier release: its files are indexed anew
        indexes = self.indexes()
        covered = {file for index in indexes.values() for file in index.files}
        group: dict[str, NDArray[np.uint8]] = {}  # value files whose keys are sorted in memory at once
        for file in sorted(files - covered):
            keys = self.keys(file)
            if keys is not None:
                group[file] = keys
            if sum(map(len, group.values())) >= INDEX_AT_ONCE:
                self._keep_index(partial(key_index.write, files=group))
                group = {}
        if group:
            self._keep_index(partial(key_index.write, files=group))
        stale = {name for name, index in indexes.items() if not files.issuperset(index.files)}
        self._merge_small(files, stale)

    def _merge_small(self, files: set[str], stale: set[str]) -> None:
        """One index of all but the largest, those that outweigh the rest; `stale` ones name files that are gone."""
        ordered = sorted(self.indexes().items(), key=lambda item: -item[1].size)
        while ordered and ordered[0][0] not in stale:
            if ordered[0][1].size <= OUTWEIGHS * sum(index.size for _, index in ordered[1:]):
                break
            ordered.pop(0)
        if len(ordered) > 1 or (ordered and ordered[0][0] in stale):
            try:
                merged = self._keep_index(partial(key_index.merge, indexes=[index for _, index in ordered], keep=files))
            except key_index.IndexGoneError:
                return
            for name, _ in ordered:
                if name != merged:
                    self.store.remove(name)

    def _keep_index(self, build: Callable[[Path], None]) -> str:
        """An index built in a temporary folder, then written as every file of the cache is; returns its name."""
        with tempfile.TemporaryDirectory(prefix="dpo-score-index-") as folder:
            path = Path(folder) / f"index{key_index.SUFFIX}"
            build(path)
            name = f"{self.folder}/index/{key_index.file_name(path)}"
            if not self.store.exists(name):
                with path.open("rb") as file:
                    self.store.write_chunks(name, iter(lambda: file.read(BUFFER_BYTES), b""))
        return name

    def keys(self, file: str) -> NDArray[np.uint8] | None:
        """The keys of a value file, None after quarantining a damaged one."""
        try:
            return keys_of(self.store.read_table(f"{self.folder}/{file}", ["key"]))
        except DamageError as error:
            self.set_aside(f"{self.folder}/{file}", error)
            return None

    def indexes(self) -> dict[str, KeyIndex]:
        """The index files that can be opened; damaged ones are quarantined."""
        found: dict[str, KeyIndex] = {}
        for name in self._index_names():
            try:
                path = self.store.local_copy(name)
                if name not in self._whole and not key_index.is_whole(path):
                    raise DamageError(f"{self.store.url(name)}: damaged index of keys")
                self._whole.add(name)
                found[name] = key_index.opened(path)
            except DamageError as error:
                self.set_aside(name, error)
            except StorageError:
                continue  # merged away by another process since it was listed: its files count as unindexed
        return found

    def _index_names(self) -> list[str]:
        """Index files of this release; those of an earlier one are left unread until the index is compacted."""
        return [name for name in self.store.list(f"{self.folder}/index") if name.endswith(key_index.SUFFIX)]

    def damaged_indexes(self) -> list[str]:
        """One sentence per index file that is not whole."""
        return [
            f"{self.store.url(name)}: damaged index of keys"
            for name in self._index_names()
            if not key_index.is_whole(self.store.local_copy(name))
        ]

    def set_aside(self, name: str, error: DamageError) -> None:
        """Quarantine a damaged file, with one warning; another process may have been faster."""
        if self.store.exists(name):
            self.warn(f"{error}; kept in quarantine, what it held is computed again")
            self.store.quarantine(name)


class CacheView:
    """Lookups in the files of one snapshot. Several files may hold a key: the first by name that serves answers."""

    def __init__(self, space: CacheSpace, files: frozenset[str]) -> None:
        self._files = files
        self._values = ValueFiles(space.store, space.folder, space.set_aside)
        indexes = list(space.indexes().values())
        missing = files.difference(*(index.files for index in indexes))
        if len(missing) > UNINDEXED_FILES:
            try:
                space.compact()
            except StorageError as error:
                space.warn(f"the cache index cannot be written, so it is built in memory ({error})")
            indexes = list(space.indexes().values())
            missing = files.difference(*(index.files for index in indexes))
        read = {file: space.keys(file) for file in sorted(missing)}
        in_memory = key_index.in_memory({file: keys for file, keys in read.items() if keys is not None})
        self._indexes = [*indexes, in_memory]

    def lookup(self, keys: Sequence[bytes], wanted: Sequence[str] = ()) -> dict[bytes, SequenceLogps]:
        """Entries of the keys that are there and carry every statistic in `wanted`; the others are misses."""
        places: dict[bytes, set[tuple[str, int]]] = {}
        for index in self._indexes:
            for key, file, row in index.find(set(keys)):
                if file in self._files:
                    places.setdefault(key, set()).add((file, row))
        in_order = {key: sorted(spots) for key, spots in places.items()}
        found: dict[bytes, SequenceLogps] = {}
        depth = 0
        while pending := {key: spots[depth] for key, spots in in_order.items() if depth < len(spots)}:
            answers = self._values.read({key: spot for key, spot in pending.items() if key not in found})
            found |= {key: entry for key, entry in answers.items() if set(wanted) <= set(entry.stats)}
            depth += 1
        return {key: found[key] for key in keys if key in found}


_ENDING = ".parquet"


def content_digest_of(name: str) -> str:
    """The digest in the name of a value file."""
    return name.removesuffix(_ENDING).rpartition("-")[2]


def file_name(hint: str, content: str) -> str:
    """The name of the value file that holds a block."""
    return f"{hint}-{content}{_ENDING}"


class Contents:
    """Digest → name, of the files listed (`names`) and of those added since."""

    def __init__(self, names: Sequence[str]) -> None:
        listed = np.array([content_digest_of(name).encode() for name in names], "S32")
        beginnings: dict[str, int] = {}  # few: what blocks are called
        numbers = [beginnings.setdefault(name[: -len(_ENDING) - 32], len(beginnings)) for name in names]
        order = np.argsort(listed)
        self._listed, self._numbers = listed[order], np.array(numbers, np.int32)[order]
        self._beginnings, self._added = list(beginnings), dict[str, str]()

    def find(self, content: str) -> str | None:
        """The name of the file that holds a block, None for a new block."""
        if content in self._added:
            return self._added[content]
        place = int(np.searchsorted(self._listed, content.encode()))
        if place == len(self._listed) or self._listed[place] != content.encode():
            return None
        return f"{self._beginnings[self._numbers[place]]}{content}{_ENDING}"

    def add(self, content: str, name: str) -> None:
        self._added[content] = name
