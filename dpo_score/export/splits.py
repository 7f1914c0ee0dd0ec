"""Which rows make up each split of an exported data set, and each of its files. Pure.

Positions count the rows of a run: all of them, or those of --sample. Boundaries depend on the data alone, so a
--limit cuts the last file short and moves none.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dpo_score.data.dataset import DataFile, Dataset
from dpo_score.data.layout import split_names
from dpo_score.engine.plan import RowBlocks

SHARD_BYTES = 500_000_000
GROWTH = 2.0
"""Bytes written for each byte read, at most: the input kept beside what was scored."""
_NOT_A_NAME = re.compile(r"\W+", re.ASCII)
_KNOWN = frozenset({"train", "test", "validation", "valid", "val", "dev", "eval"})


@dataclass(frozen=True, slots=True)
class Shard:
    """File `index` of `of` of a split: positions [start, stop) of the run."""

    split: str
    index: int
    of: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"data/{self.split}-{self.index:05d}-of-{self.of:05d}.parquet"

    @property
    def stage(self) -> str:
        return f"data/{self.split}"


@dataclass(frozen=True, slots=True)
class Split:
    """Rows [start, stop) of all sets (numbered through), with the bytes of their files."""

    name: str
    start: int
    stop: int
    bytes: int


def splits_of(datasets: Sequence[Dataset]) -> tuple[Split, ...]:
    """In reading order. One set: its splits' names. Several: the names of the sets, and of their splits if many."""
    found: list[Split] = []
    row = 0
    for dataset in datasets:
        labels = [_label(dataset, file) for file in dataset.files]
        several = len(set(labels)) > 1
        for file, label in zip(dataset.files, labels, strict=True):
            own = _NOT_A_NAME.sub("_", dataset.spec.name)
            name = label if len(datasets) == 1 else f"{own}_{label}" if several else own
            _append(found, Split(name, row, row + file.rows, file.size))
            row += file.rows
    return tuple(found)


def _append(found: list[Split], new: Split) -> None:
    """Files of one split that follow each other are one range; a name that comes back later gets a number."""
    if found and found[-1].name == new.name:
        last = found.pop()
        found.append(Split(last.name, last.start, new.stop, last.bytes + new.bytes))
        return
    same = sum(split.name == new.name or split.name.startswith(f"{new.name}_part") for split in found)
    found.append(Split(f"{new.name}_part{same + 1}" if same else new.name, new.start, new.stop, new.bytes))


def _label(dataset: Dataset, file: DataFile) -> str:
    names = split_names(file.name)
    asked = next((split for split in dataset.spec.split if split in names), None)
    known = next((name for name in names if name in _KNOWN), "train")
    return _NOT_A_NAME.sub("_", asked or known)


def shards_of(splits: Sequence[Split], rows: RowBlocks) -> Iterator[Shard]:
    """The files to write, in order; those that a --limit leaves without rows are left out."""
    for split in splits:
        start, stop = _position(split.start, rows), _position(split.stop, rows)
        count = max(1, math.ceil(split.bytes * GROWTH / SHARD_BYTES)) if stop > start else 0
        for index in range(count):
            first = start + (stop - start) * index // count
            last = min(start + (stop - start) * (index + 1) // count, rows.wanted)
            if first < last:
                yield Shard(split.name, index, count, first, last)


def _position(row: int, rows: RowBlocks) -> int:
    return row if rows.sample is None else bisect_left(rows.sample, row)
