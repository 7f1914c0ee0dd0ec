"""Where a key lies: sorted slots in a file that is searched through a memory map.

    N slots (24 bytes: high and low half of the key, file, row), sorted by the high half
    directory: 2^bits + 1 positions, the first slot of each prefix bucket
    the names of the files, JSON
    tail: N, bits, length of the names, blake2b-128 of all before it, magic

Promises: resident memory is a bounded number of pages however large the index is; an index is derived from the
Parquet files it names and can be deleted at any time. What it says of a row is checked by whoever reads the row.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_score.errors import DamageError
from dpo_score.storage.faults import translated

SLOT = np.dtype([("high", "<u8"), ("low", "<u8"), ("file", "<u4"), ("row", "<u4")])
TAIL = struct.Struct("<QII16s8s")
MAGIC = b"dpoidx01"
BUCKET_SLOTS = 512
QUERIES_AT_ONCE = 256
MERGE_SLOTS = 1 << 20
Slots = NDArray[np.void]
Words = NDArray[np.uint64]


def halves(keys: NDArray[np.uint8]) -> tuple[Words, Words]:
    """High and low halves of 16-byte keys, such that the order of the numbers is that of the bytes."""
    words = np.ascontiguousarray(keys).view(">u8").astype(np.uint64).reshape(-1, 2)
    return words[:, 0], words[:, 1]


def slots_of(files: Sequence[NDArray[np.uint8]]) -> Slots:
    """Sorted slots of the keys of several files; equal keys stay in the order of files and rows."""
    slots = np.zeros(sum(len(keys) for keys in files), SLOT)
    if len(slots):
        slots["high"], slots["low"] = halves(np.concatenate(files))
        slots["file"] = np.repeat(np.arange(len(files)), [len(keys) for keys in files])
        slots["row"] = np.concatenate([np.arange(len(keys)) for keys in files])
    return slots[np.argsort(slots["high"], kind="stable")]


@dataclass(frozen=True, slots=True, eq=False)
class KeyIndex:
    """Slots, their directory, and the names that `file` numbers stand for. `source` is the map beneath, if any."""

    slots: Slots
    directory: NDArray[np.uint64]
    files: tuple[str, ...]
    source: mmap.mmap | None = None

    def find(self, keys: NDArray[np.uint8]) -> Iterator[tuple[int, int, int]]:
        """(query, file, row) of every slot whose key equals keys[query]; none, one or more per query."""
        high, low = halves(keys)
        order = np.argsort(high, kind="stable")
        for start in range(0, len(order), QUERIES_AT_ONCE):
            queries = order[start : start + QUERIES_AT_ONCE]
            yield from self._found(queries, high[queries], low[queries])
            if self.source is not None:
                self.source.madvise(mmap.MADV_DONTNEED)

    def _found(self, queries: NDArray[np.int64], high: Words, low: Words) -> list[tuple[int, int, int]]:
        first, end = self.position(high, after=False), self.position(high, after=True)
        lengths = end - first
        slot = np.repeat(first, lengths) + np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        hits = self.slots[slot]
        equal = hits["low"] == np.repeat(low, lengths)
        found = zip(np.repeat(queries, lengths)[equal], hits["file"][equal], hits["row"][equal], strict=True)
        return [(int(query), int(file), int(row)) for query, file, row in found]

    def position(self, high: Words, after: bool) -> NDArray[np.int64]:
        """The first slot whose high half is >= each of `high` (with `after`: >), by bisection inside its bucket."""
        bucket = prefix(high, len(self.directory))
        low, end = self.directory[bucket].astype(np.int64), self.directory[bucket + 1].astype(np.int64)
        column = self.slots["high"]
        while (open_ := low < end).any():
            middle = (low + end) // 2
            value = column[np.where(open_, middle, 0)]
            below = open_ & (value <= high if after else value < high)
            low = np.where(below, middle + 1, low)
            end = np.where(open_ & ~below, middle, end)
        return low


def prefix(high: Words, directory_length: int) -> NDArray[np.int64]:
    """The bucket of each key: its leading bits."""
    bits = (directory_length - 1).bit_length() - 1
    return (high >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(high), np.int64)


def directory_bits(slots: int) -> int:
    return min((slots // BUCKET_SLOTS).bit_length(), 24)


def in_memory(files: Sequence[str], keys: Sequence[NDArray[np.uint8]]) -> KeyIndex:
    """An index of a few files, without a file of its own."""
    slots = slots_of(keys)
    return KeyIndex(slots, _directory([slots], directory_bits(len(slots))), tuple(files))


def _directory(parts: Iterable[Slots], bits: int) -> NDArray[np.uint64]:
    counts = np.zeros(1 << bits, np.uint64)
    for part in parts:
        counts += np.bincount(prefix(part["high"], len(counts) + 1), minlength=len(counts)).astype(np.uint64)
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(counts)]).astype(np.uint64)


def encoded(parts: Iterable[Slots], files: Sequence[str], total: int) -> Iterator[bytes]:
    """The bytes of an index file. `parts`: sorted slots, in order, at most `total` of them, read once."""
    digest, bits, written = hashlib.blake2b(digest_size=16), directory_bits(total), 0
    directory = np.zeros((1 << bits) + 1, np.uint64)
    for part in parts:
        directory += _directory([part], bits)
        written += len(part)
        digest.update(data := part.tobytes())
        yield data
    listed = json.dumps(list(files)).encode("ascii")
    digest.update(directory.tobytes() + listed)
    yield directory.tobytes() + listed + TAIL.pack(written, bits, len(listed), digest.digest(), MAGIC)


def opened(path: Path) -> KeyIndex:
    """Map an index file. DamageError when it is not a whole one."""
    with translated(path), path.open("rb") as file:
        source = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None
    if source is None or len(source) < TAIL.size:
        raise DamageError(f"{path}: not an index of keys")
    count, bits, listed, _, magic = TAIL.unpack(source[-TAIL.size :])
    start, length = count * SLOT.itemsize, (1 << min(bits, 24)) + 1
    if magic != MAGIC or start + length * 8 + listed + TAIL.size != len(source):
        raise DamageError(f"{path}: not a whole index of keys")
    slots = np.frombuffer(source, SLOT, count)
    directory = np.frombuffer(source, "<u8", length, start)
    return KeyIndex(slots, directory, _names(source, start + length * 8, listed, path), source)


def _names(source: mmap.mmap, start: int, length: int, path: Path) -> tuple[str, ...]:
    try:
        return tuple(str(name) for name in json.loads(source[start : start + length]))
    except ValueError as error:
        raise DamageError(f"{path}: the names in this index cannot be read") from error


def is_whole(path: Path) -> bool:
    """Whether the digest in the tail matches the bytes before it."""
    digest = hashlib.blake2b(digest_size=16)
    with translated(path), path.open("rb") as file:
        left = path.stat().st_size - TAIL.size
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        tail = file.read()
    return len(tail) == TAIL.size and TAIL.unpack(tail)[3] == digest.digest()


def merged(indexes: Sequence[KeyIndex], keep: Collection[str]) -> tuple[Iterator[Slots], tuple[str, ...], int]:
    """Slots of several indexes in order, the files they speak of, and a bound on their number.

    Files outside `keep` are left out, and so is a file that an earlier index already speaks of.
    """
    files: dict[str, int] = {}
    numbers = [_renumbered(index.files, files, keep) for index in indexes]
    total = sum(len(index.slots) for index in indexes)
    return _merge(indexes, numbers, total), tuple(files), total


def _renumbered(names: Sequence[str], files: dict[str, int], keep: Collection[str]) -> NDArray[np.int64]:
    """New file number of each name, -1 for those left out; extends `files`."""
    fresh = [name in keep and name not in files for name in names]
    for name in (name for name, new in zip(names, fresh, strict=True) if new):
        files[name] = len(files)
    return np.array([files[name] if new else -1 for name, new in zip(names, fresh, strict=True)], np.int64)


def _merge(indexes: Sequence[KeyIndex], numbers: Sequence[NDArray[np.int64]], total: int) -> Iterator[Slots]:
    bits = (total // MERGE_SLOTS).bit_length()
    bounds = np.arange(1, 1 << bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.zeros(0, np.uint64)
    cuts = [np.concatenate([[0], index.position(bounds, after=False), [len(index.slots)]]) for index in indexes]
    for bucket in range(1 << bits):
        parts = [
            _taken(index, int(cut[bucket]), int(cut[bucket + 1]), number)
            for index, cut, number in zip(indexes, cuts, numbers, strict=True)
        ]
        together: Any = np.concatenate(parts)
        yield together[np.argsort(together["high"], kind="stable")]


def _taken(index: KeyIndex, start: int, stop: int, number: NDArray[np.int64]) -> Slots:
    """A copy of some slots, renumbered, without those left out."""
    part = index.slots[start:stop].copy()
    if index.source is not None:
        index.source.madvise(mmap.MADV_DONTNEED)
    renamed = number[part["file"]] if len(part) else np.zeros(0, np.int64)
    part["file"] = np.maximum(renamed, 0)
    kept: Slots = part[renamed >= 0]
    return kept
