"""What a summary reads of score tables, row by row, as compact arrays.

Tables are read one at a time and dropped; what stays is about 100 bytes for each scored row, because exact
quantiles and cluster-robust intervals need every value. Rows keep the order of the tables. A row counts as scored
when both policy sums are there.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo_score.losses.ops import Floats
from dpo_score.metrics.groups import BUILT_IN, DATA, DATASET, LENGTH, Grouping, by_length, group_field, numbered
from dpo_score.metrics.intervals import connected_clusters, repeats

FLOATS = (
    "loss",
    "chosen_rewards",
    "rejected_rewards",
    "margins_nats",
    "dpo_weight",
    "policy_chosen_logps",
    "policy_rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
)
TOKENS = ("chosen_tokens", "rejected_tokens")
FLAGS = ("truncated", "tied", "overflow")
LABELS = (DATASET, "subset")
"""Columns that rows are always grouped by, each value being a group; a slice of one is these same groups."""
AS_LABELLED = "each of its values; pairs without one are in none"
VOCABULARY = ("status", "marks")
"""Columns of texts that this program writes itself: none is a text of the data."""
PROMPT, GROUP = "prompt_digest", "group_id"
COLUMNS = (
    *FLOATS,
    *TOKENS,
    *("chosen_truncated", "rejected_truncated", "tied", "loss_code", "status"),
    *LABELS,
    *(PROMPT, GROUP),
)
"""What `collect` reads of a score table, besides slices."""
Rejects = Counter[tuple[str, str]]
"""(dataset, code) → rows."""


class Texts(Sequence[str]):
    """A column of texts that takes little more than its characters: a million Python strings take 50 MB beside them."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        text: str = self.column[place].as_py()
        return text

    def __len__(self) -> int:
        return len(self.column)

    def __eq__(self, other: object) -> bool:
        return self.column.equals(other.column) if isinstance(other, Texts) else list(self) == other

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class ScoreArrays:
    """Scored rows as arrays of one length. `labels[name]` holds an index into `names[name]` for every row.

    `values`: FLOATS, and TOKENS kept as float32, NaN where null. `flags`: FLAGS. `groupings`: how each slice was made,
    in words; the names of a slice are in the order to show them in. `quoting`: slices whose names are the data's texts.
    """

    values: dict[str, Floats]
    flags: dict[str, NDArray[np.bool_]]
    labels: dict[str, NDArray[np.int32]]
    names: dict[str, tuple[str, ...]]
    clusters: NDArray[np.int64]
    rejected: Rejects = field(default_factory=Counter)
    groupings: Mapping[str, str] = field(default_factory=dict)
    quoting: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.clusters)

    @property
    def repeated(self) -> NDArray[np.int64] | None:
        """The clusters where some prompt or group repeats, else None: then rows are independent."""
        return self.clusters if repeats(self.clusters) else None

    def take(self, rows: NDArray[np.int64]) -> ScoreArrays:
        return ScoreArrays(
            values={name: values[rows] for name, values in self.values.items()},
            flags={name: values[rows] for name, values in self.flags.items()},
            labels={name: values[rows] for name, values in self.labels.items()},
            names=self.names,
            clusters=self.clusters[rows],
            rejected=self.rejected,
            groupings=self.groupings,
            quoting=self.quoting,
        )

    def present(self, label: str) -> list[str]:
        """The names of a label that occur, but for the empty one, in order."""
        codes = set(np.unique(self.labels[label]).tolist())
        found = [name for index, name in enumerate(self.names[label]) if name and index in codes]
        return sorted(found) if label in LABELS else found


def collect(tables: Iterable[pa.Table], *, rejects: Iterable[pa.Table] = (), slices: Sequence[str] = ()) -> ScoreArrays:
    """Read score tables (and reject tables, for their counts) once, in order.

    `slices`: columns to group by besides LABELS, grouped as groups.py says; "length" and "data" need no column.
    """
    names: dict[str, dict[str, int]] = {label: {} for label in LABELS}
    sliced: dict[str, list[pa.Table]] = {name: [] for name in slices if name not in LABELS}
    parts: list[dict[str, NDArray[Any]]] = []
    rejected: Rejects = Counter()
    seen = 0
    for table in tables:
        table, refused = _split_scored(table)
        rejected.update(refused)
        parts.append(_arrays(table, names, seen))
        for name, found in sliced.items():
            column = table.select([name]) if name in table.column_names else pa.table({name: pa.nulls(table.num_rows)})
            found.append(column.replace_schema_metadata(None))
        seen += table.num_rows
    for table in rejects:
        rejected.update(zip(_texts(table, "dataset"), table.column("code").to_pylist(), strict=True))

    def joined(name: str, dtype: Any) -> NDArray[Any]:
        return np.concatenate([np.empty(0, dtype), *(part.pop(name) for part in parts)])  # one copy at a time

    rows = ScoreArrays(
        values={name: joined(name, np.float32 if name in TOKENS else np.float64) for name in (*FLOATS, *TOKENS)},
        flags={name: joined(name, np.bool_) for name in FLAGS},
        labels={label: joined(f"label:{label}", np.int32) for label in LABELS},
        names={label: tuple(codes) for label, codes in names.items()},
        clusters=connected_clusters(joined("prompt", np.uint64), joined("group", np.uint64)),
        rejected=rejected,
    )
    groupings = {name: _grouping(name, found, rows) for name, found in sliced.items()}
    return replace(
        rows,
        labels=rows.labels | {name: found.codes for name, found in groupings.items()},
        names=rows.names | {name: found.names for name, found in groupings.items()},
        groupings={name: groupings[name].how if name in groupings else AS_LABELLED for name in slices},
        quoting=frozenset(name for name, found in groupings.items() if found.quotes and name not in VOCABULARY),
    )


def without_texts(rows: ScoreArrays) -> ScoreArrays:
    """The rows with groups of texts numbered in their order: no text of the data is left in the name of a slice."""
    return replace(
        rows,
        names=rows.names | {name: numbered(rows.names[name]) for name in rows.quoting},
        groupings={name: f"{how}; numbered" if name in rows.quoting else how for name, how in rows.groupings.items()},
        quoting=frozenset(),
    )


def _grouping(name: str, columns: list[pa.Table], rows: ScoreArrays) -> Grouping:
    """Groups of a column; where no table has it, of what is built in under its name."""
    table = pa.concat_tables(columns or [pa.table({name: pa.nulls(0)})], promote_options="permissive")
    if name == LENGTH and pa.types.is_null(table.field(0).type):
        return by_length(np.fmax(rows.values["chosen_tokens"], rows.values["rejected_tokens"]))
    if name == DATA and pa.types.is_null(table.field(0).type):
        return Grouping(rows.labels[DATASET], rows.names[DATASET], BUILT_IN[DATA])
    return group_field(table.column(0), table.field(0))


def _split_scored(table: pa.Table) -> tuple[pa.Table, Rejects]:
    """The rows that have policy sums, and the others counted by their status."""
    scored = np.ones(table.num_rows, bool)
    for name in ("policy_chosen_logps", "policy_rejected_logps"):
        scored &= table.column(name).is_valid().to_numpy(zero_copy_only=False)
    if scored.all():
        return table, Counter()
    refused = table.filter(pa.array(~scored))
    codes = Counter(zip(_texts(refused, "dataset"), _texts(refused, "status", "unknown"), strict=True))
    return table.filter(pa.array(scored)), codes


def _texts(table: pa.Table, name: str, missing: str = "") -> list[str]:
    if name not in table.column_names:
        return [missing] * table.num_rows
    return [missing if value is None else str(value) for value in table.column(name).to_pylist()]


def _arrays(table: pa.Table, names: dict[str, dict[str, int]], seen: int) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {name: _numbers(table, name) for name in FLOATS}
    arrays |= {name: _numbers(table, name).astype(np.float32) for name in TOKENS}  # exact up to 16 million tokens
    arrays["truncated"] = _flag(table, "chosen_truncated", "rejected_truncated")
    arrays["tied"] = _flag(table, "tied")
    arrays["overflow"] = _is_overflow(table)
    for label, codes in names.items():
        texts = pa.array(_texts(table, label), pa.string()).dictionary_encode()
        numbers = [
            codes.setdefault(text, len(codes)) for text in texts.dictionary.to_pylist()
        ]  # in order of first sight
        arrays[f"label:{label}"] = np.array(numbers, np.int32)[texts.indices.to_numpy(zero_copy_only=False)]
    for name, column in (("prompt", PROMPT), ("group", GROUP)):
        arrays[name] = _hashes(table, column, seen)
    return arrays


def _numbers(table: pa.Table, name: str) -> Floats:
    if name not in table.column_names or pa.types.is_null(table.column(name).type):
        return np.full(table.num_rows, np.nan)
    values: Floats = table.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def _flag(table: pa.Table, *names: str) -> NDArray[np.bool_]:
    """True where any of the boolean columns is; null and absent are false."""
    flags = np.zeros(table.num_rows, np.bool_)
    for name in names:
        if name in table.column_names:
            flags |= pc.fill_null(table.column(name).cast(pa.bool_()), False).to_numpy(zero_copy_only=False)
    return flags


def _is_overflow(table: pa.Table) -> NDArray[np.bool_]:
    if "loss_code" not in table.column_names:
        return np.zeros(table.num_rows, np.bool_)
    codes = pc.equal(table.column("loss_code").cast(pa.string()), "overflow")
    found: NDArray[np.bool_] = pc.fill_null(codes, False).to_numpy(zero_copy_only=False)
    return found


def _hashes(table: pa.Table, name: str, seen: int) -> NDArray[np.uint64]:
    """64-bit labels of a text column; a null is unlike every other row."""
    own = (np.arange(seen, seen + table.num_rows, dtype=np.uint64) << np.uint64(1)) + np.uint64(1)
    if name not in table.column_names or table.column(name).null_count == table.num_rows:
        return own
    column = table.column(name).cast(pa.string()).combine_chunks()
    digests = _digest_words(column)
    if digests is not None:
        return digests
    texts = column.to_pylist()
    return np.fromiter((own[row] if text is None else _hash(text) for row, text in enumerate(texts)), np.uint64)


def _digest_words(column: Any) -> NDArray[np.uint64] | None:
    """The labels of a column of 128-bit hexadecimal digests, which need no hashing, only folding; else None."""
    widths = pc.unique(pc.binary_length(column)).to_pylist()
    if widths != [32]:
        return None
    fixed = column.cast(pa.binary()).cast(pa.binary(32))
    words = np.frombuffer(fixed.buffers()[1], np.uint64, 4 * len(fixed), 32 * fixed.offset).reshape(-1, 4)
    folded = np.zeros(len(words), np.uint64)
    for index in range(4):
        folded = (folded ^ words[:, index]) * np.uint64(0x9E3779B97F4A7C15)  # odd: each step is one-to-one
        folded ^= folded >> np.uint64(29)
    return folded & ~np.uint64(1)  # an odd label stands for a row without one


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") & ~1
