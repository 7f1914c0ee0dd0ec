"""Log-probs of many sequences as arrays, the Parquet file that holds such a block, and reading rows of it again.

    key         fixed_size_binary(16)   content address of a sequence
    check       uint64                  checksum of the row: a flipped bit anywhere in it is found when it is read
    token_logps list<float32>           one value (nats) per scored token
    <stat>      list<float32>           one value per scored token, null where the entry has no such statistic

An entry is returned only when its key is the one asked for and its row matches its checksum; a file where that fails
is reported once and answers nothing more. Few files are open at a time, and only the row groups asked for are read.
Legend: N entries, T values of all entries together, row i holding [offsets[i], offsets[i+1]).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_score.errors import DamageError, StorageError
from dpo_score.storage.base import Store

Float32 = NDArray[np.float32]
KEY_BYTES = 16
LOGPS = "token_logps"
OWN_COLUMNS = ("key", "check")


@dataclass(frozen=True, slots=True, eq=False)
class SequenceLogps:
    """What one model gives for one sequence, as it is scored and as the cache keeps it.

    `token_logps` and each array of `stats`: fp32 [n], one per scored token, in nats. `redone_dtype`: the dtype of a
    second pass where the first one overflowed, else None; the cache keeps such values in a namespace of that dtype.
    """

    token_logps: Float32
    stats: Mapping[str, Float32] = field(default_factory=dict)
    redone_dtype: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EntryBlock:
    """N entries in arrays: keys_N16 bytes, offsets (N+1), per column its T values and which entries have it."""

    keys: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    columns: Mapping[str, Float32]
    present: Mapping[str, NDArray[np.bool_]]

    @property
    def content_digest(self) -> str:
        """blake2b-128 of keys and values in their order: equal blocks have equal names."""
        state = hashlib.blake2b(digest_size=16)
        state.update(self.keys.tobytes())
        state.update(self.offsets.astype("<i8").tobytes())
        for name in sorted(self.columns):
            state.update(name.encode() + b"\0" + self.present[name].tobytes())
            state.update(self.columns[name].astype("<f4").tobytes())
        return state.hexdigest()


def is_finite(entry: SequenceLogps) -> bool:
    """Whether every value is a number; others are never stored."""
    return all(bool(np.isfinite(values).all()) for values in (entry.token_logps, *entry.stats.values()))


def pack(entries: Mapping[bytes, SequenceLogps]) -> EntryBlock:
    """Arrays of `entries`, in their order. Statistics must be as long as the log-probabilities."""
    listed = list(entries.values())
    lengths = np.array([len(entry.token_logps) for entry in listed], np.int64)
    names = sorted({name for entry in listed for name in entry.stats})
    columns = {LOGPS: _joined([entry.token_logps for entry in listed], lengths)}
    columns |= {name: _joined([entry.stats.get(name) for entry in listed], lengths) for name in names}
    present = {LOGPS: np.ones(len(listed), bool)}
    present |= {name: np.array([name in entry.stats for entry in listed], bool) for name in names}
    keys = np.frombuffer(b"".join(entries), np.uint8).reshape(len(listed), KEY_BYTES)
    return EntryBlock(keys, np.concatenate([[0], np.cumsum(lengths)]), columns, present)


def _joined(parts: Sequence[Float32 | None], lengths: NDArray[np.int64]) -> Float32:
    filled = [np.zeros(n, np.float32) if part is None else part for part, n in zip(parts, lengths, strict=True)]
    assert [len(part) for part in filled] == lengths.tolist(), "a statistic has one value per scored token"
    return np.concatenate([np.zeros(0, np.float32), *filled]).astype(np.float32, copy=False)


def to_table(block: EntryBlock) -> pa.Table:
    offsets = pa.array(block.offsets.astype(np.int32))
    arrays = {
        "key": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(KEY_BYTES), len(block.keys), [None, pa.py_buffer(np.ascontiguousarray(block.keys))]
        ),
        "check": pa.array(row_checks(block)),
    }
    for name in sorted(block.columns):
        present, values = block.present[name], block.columns[name]
        if present.all():
            arrays[name] = pa.ListArray.from_arrays(offsets, pa.array(values))
            continue
        lengths = np.diff(block.offsets)  # an absent list has no values of its own: pyarrow 21 writes no others
        own = np.concatenate([[0], np.cumsum(np.where(present, lengths, 0))]).astype(np.int32)
        there = pa.array(values[np.repeat(present, lengths)])
        arrays[name] = pa.ListArray.from_arrays(pa.array(own), there, mask=pa.array(~present))
    return pa.table(arrays)


def from_table(table: pa.Table, name: str) -> EntryBlock:
    """The entries of a table. DamageError naming `name` when a row's checksum does not hold."""

    def lengths_of(lists: Any) -> NDArray[np.int64]:
        found: NDArray[np.int64] = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        return found

    lists = {
        column: table.column(column).combine_chunks() for column in table.column_names if column not in OWN_COLUMNS
    }
    lengths = lengths_of(lists[LOGPS])
    present = {column: values.is_valid().to_numpy(zero_copy_only=False) for column, values in lists.items()}
    columns: dict[str, Float32] = {}
    for column, values in lists.items():
        if not np.array_equal(lengths_of(values), np.where(present[column], lengths, 0)):
            raise DamageError(f"{name}: columns of a row differ in length")
        columns[column] = values.flatten().to_numpy(zero_copy_only=False)
        if not present[column].all():  # zeros where an entry has none, so that every column shares its offsets
            whole = np.zeros(int(lengths.sum()), np.float32)
            whole[np.repeat(present[column], lengths)] = columns[column]
            columns[column] = whole
    block = EntryBlock(keys_of(table), np.concatenate([[0], np.cumsum(lengths)]), columns, present)
    if not np.array_equal(row_checks(block), table.column("check").to_numpy()):
        raise DamageError(f"{name}: a row does not match its checksum")
    return block


def keys_of(table: pa.Table) -> NDArray[np.uint8]:
    """The key column as bytes, (N, 16)."""
    column = table.column("key").combine_chunks()
    flat = np.frombuffer(column.buffers()[1] or b"", np.uint8)
    start = column.offset * KEY_BYTES
    return flat[start : start + len(column) * KEY_BYTES].reshape(len(column), KEY_BYTES)


def row_checks(block: EntryBlock) -> NDArray[np.uint64]:
    """One uint64 per entry: Σ (word + 1) · odd weight of column and position, modulo 2⁶⁴.

    An odd factor is invertible modulo 2⁶⁴, so a change of any one word always changes the sum.
    """
    words = block.keys.view("<u8").astype(np.uint64) if len(block.keys) else np.zeros((0, 2), np.uint64)
    sums: NDArray[np.uint64] = (words * np.array([_weight("key.0"), _weight("key.1")])).sum(axis=1, dtype=np.uint64)
    lengths = np.diff(block.offsets)
    position = np.arange(block.offsets[-1]) - np.repeat(block.offsets[:-1], lengths)
    for name in sorted(block.columns):
        weights = (position.astype(np.uint64) * np.uint64(2) + np.uint64(1)) * _weight(name)
        terms = (block.columns[name].view(np.uint32).astype(np.uint64) + np.uint64(1)) * weights
        running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
        sums += (running[block.offsets[1:]] - running[block.offsets[:-1]]) * block.present[name].astype(np.uint64)
    return sums


def _weight(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") | 1)


def entry_at(block: EntryBlock, row: int) -> SequenceLogps:
    """One entry, in memory of its own."""
    start, stop = int(block.offsets[row]), int(block.offsets[row + 1])
    own = {name: values[start:stop].copy() for name, values in block.columns.items() if block.present[name][row]}
    return SequenceLogps(own.pop(LOGPS), own)


NAMESPACE = "namespace"
OPEN_FILES = 16
GROUPS_AT_ONCE = 64


def misplaced(metadata: Mapping[bytes, bytes] | None, name: str) -> str | None:
    """Why a value file must not answer where it lies (`name` in the cache): it was made for another namespace, that is
    for other weights, numerics or versions. None where it belongs, or where it was written by a release that did
    not name namespaces: what such a file answers lies in namespaces that are not asked any more."""
    here = name.rpartition("/")[0].rpartition("/")[2]
    made_for = (metadata or {}).get(NAMESPACE.encode(), b"").decode(errors="replace")
    if made_for in (here, ""):
        return None
    return f"it was made for another namespace of the cache ({made_for})"


class ValueFiles:
    """The value files of one namespace, opened on demand."""

    def __init__(self, store: Store, folder: str, set_aside: Callable[[str, DamageError], None]) -> None:
        self._store, self._folder, self._set_aside = store, folder, set_aside
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._broken: set[str] = set()

    def read(self, spots: Mapping[bytes, tuple[str, int]]) -> dict[bytes, SequenceLogps]:
        """The entries at (file, row); a key whose file is gone or damaged is left out."""
        by_file: dict[str, dict[int, bytes]] = {}
        for key, (file, row) in spots.items():
            by_file.setdefault(file, {})[row] = key
        found: dict[bytes, SequenceLogps] = {}
        for file in sorted(by_file.keys() - self._broken):
            name = f"{self._folder}/{file}"
            try:
                found |= dict(self._rows(name, by_file[file]))
            except DamageError as error:
                self._close(file)
                self._set_aside(name, error)
            except StorageError:
                if self._store.exists(name):
                    raise
                self._close(file)  # removed by another process (gc, quarantine): its entries are misses
        return found

    def _close(self, file: str) -> None:
        """Ask this file nothing more."""
        self._broken.add(file)
        opened = self._open.pop(f"{self._folder}/{file}", None)
        if opened is not None:
            opened.close()

    def _rows(self, name: str, keys: Mapping[int, bytes]) -> Iterator[tuple[bytes, SequenceLogps]]:
        """Entries of some rows of one file, a few row groups at a time."""
        metadata = self._opened(name).metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        rows = np.array(sorted(keys), np.int64)
        group_of = np.searchsorted(starts, rows, side="right") - 1
        needed = np.unique(group_of)
        for first in range(0, len(needed), GROUPS_AT_ONCE):
            part = needed[first : first + GROUPS_AT_ONCE]
            with self._store.reading(name):
                table = self._opened(name).read_row_groups(part.tolist(), use_threads=False)
            block = from_table(table, self._store.url(name))
            there = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in part])
            place = {int(row): i for i, row in enumerate(there)}
            for row in rows[np.isin(group_of, part)].tolist():
                if block.keys[place[row]].tobytes() != keys[row]:
                    raise DamageError(f"{self._store.url(name)}: row {row} holds another sequence than its index says")
                yield keys[row], entry_at(block, place[row])

    def _opened(self, name: str) -> Any:
        if name not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            opened = self._store.open_table(name)
            if reason := misplaced(opened.schema_arrow.metadata, name):
                opened.close()
                raise DamageError(f"{self._store.url(name)}: {reason}")
            self._open[name] = opened
        self._open.move_to_end(name)
        return self._open[name]
