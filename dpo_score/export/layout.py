"""What an exported data set looks like before a file of it is written: its rows, its columns, their types."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_score.data.dataset import PairReader
from dpo_score.data.types import Pair, Rejected
from dpo_score.engine.plan import SCHEMA_VERSION, RunPlan
from dpo_score.export.as_scored import Layout, as_scored, kept_names, layout, survey
from dpo_score.export.exports import LABELS, MASKS, TEXTS, TOKEN_IDS, VALUES, Consumer
from dpo_score.export.input_rows import OriginalRows, source_schema
from dpo_score.results.schemas import IDS, MASK

SLICE_ROWS = 512
TOKEN_VALUES = tuple(name.replace("_logps", "_token_logps") for name in VALUES)
Unit = Sequence[Pair | Rejected]
"""What one row gives: one item, or one for each pair that it expands to."""


@dataclass(frozen=True, slots=True)
class Export:
    """How the data set is written. `renames`: column → name in the files; `masks`: which ids were scored."""

    consumer: Consumer
    emit_ids: bool
    per_token: bool
    masks: bool
    ld_alpha: float | None = None
    renames: Mapping[str, str] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """What the files depend on besides the reference values."""
        return {
            "consumer": self.consumer.name,
            "emit_ids": self.emit_ids,
            "per_token": self.per_token,
            "ld_alpha": self.ld_alpha,
            "renames": dict(self.renames),
            "version": SCHEMA_VERSION,
        }

    def added(self) -> pa.Schema:
        """The columns that follow those of the input."""
        ids = [(name, IDS) for name in TOKEN_IDS] if self.emit_ids else []
        masks = [(name, MASK) for name in MASKS] if self.emit_ids and self.masks else []
        lists = [(name, pa.list_(pa.float32())) for name in TOKEN_VALUES] if self.per_token else []
        labels = [(name, pa.string()) for name in LABELS]
        values = [(name, pa.float64()) for name in VALUES]
        return pa.schema([*labels, *ids, *masks, *values, *lists, ("status", pa.string())])


@dataclass(frozen=True, slots=True)
class Slice:
    """Some consecutive rows of one block: their numbers among all rows, and what each gives."""

    block: int
    rows: Sequence[int]
    units: Sequence[Unit]

    @property
    def items(self) -> list[Pair | Rejected]:
        return [item for unit in self.units for item in unit]


class _Forward:
    """Reads rows by number, ascending, skipping over small gaps instead of opening a file again."""

    def __init__(self, plan: RunPlan) -> None:
        self._reader, self._at = PairReader(plan.datasets), -1

    def units(self, rows: Sequence[int]) -> list[Unit]:
        if isinstance(rows, range):
            return list(self._reader.units(rows.start, rows.stop))
        return [self._unit(row) for row in rows]

    def _unit(self, row: int) -> Unit:
        if 0 <= self._at < row < self._at + SLICE_ROWS:
            list(self._reader.units(self._at, row))
        self._at = row + 1
        return next(self._reader.units(row, row + 1))


class RunRows:
    """The rows of a run by position: [0, wanted), of one set after the other."""

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan

    def first_row(self, index: int) -> int:
        """Number of a set's first row among the rows of all sets."""
        return sum(dataset.rows for dataset in self._plan.datasets[:index])

    def span(self, index: int) -> tuple[int, int]:
        """Positions [start, stop) of the wanted rows of a set."""
        start, wanted = self.first_row(index), self._plan.rows.wanted
        stop = start + self._plan.datasets[index].rows
        return min(self._position(start), wanted), min(self._position(stop), wanted)

    def set_of(self, position: int) -> int:
        """The set that the row at a position belongs to."""
        spans = map(self.span, range(len(self._plan.datasets)))
        return next(index for index, (start, stop) in enumerate(spans) if start <= position < stop)

    def slices(self, start: int, stop: int) -> Iterator[Slice]:
        """Positions [start, stop), at most SLICE_ROWS of one block at a time, read as one stream."""
        reader, size = _Forward(self._plan), self._plan.rows.block_rows
        while start < stop:
            last = min(start + SLICE_ROWS, (start // size + 1) * size, stop)
            sample = self._plan.rows.sample
            rows = range(start, last) if sample is None else sample[start:last]
            yield Slice(start // size, rows, reader.units(rows))
            start = last

    def _position(self, row: int) -> int:
        sample = self._plan.rows.sample
        return row if sample is None else bisect_left(sample, row)


@dataclass(frozen=True, slots=True)
class SetPlan:
    """One set: the input's columns, their names in the output, what is written anew, and what results."""

    source: pa.Schema
    layout: Layout
    kept: Mapping[str, str]
    schema: pa.Schema


def plan_set(plan: RunPlan, rows: RunRows, export: Export, index: int) -> SetPlan:
    """Reads the set once where texts are written; a consumer of ids needs no look at the rows."""
    source, added = source_schema(plan.datasets[index]), export.added()
    found, texts = Layout({}), export.consumer.texts
    if texts:
        found = layout(survey(_surveyed(plan, rows, index, source), plan.renderer.text), source)
    kept = kept_names(source.names, {*found.built, *added.names, *(() if texts else TEXTS)})
    return SetPlan(source, found, kept, _output_schema(source, found, kept, added))


def _surveyed(
    plan: RunPlan, rows: RunRows, index: int, source: pa.Schema
) -> Iterator[tuple[list[Pair | None], pa.Table]]:
    originals = OriginalRows(plan.datasets[index], source, rows.first_row(index))
    wanted = [name for name in TEXTS if name in source.names]
    for piece in rows.slices(*rows.span(index)):
        pairs = [as_scored(item, plan.renderer.text) for item in piece.items]
        yield pairs, per_item(originals.take(piece.rows).select(wanted), piece.units)


def per_item(table: pa.Table, units: Sequence[Unit]) -> pa.Table:
    """One row a unit → one row an item."""
    counts = [len(unit) for unit in units]
    return table if all(count == 1 for count in counts) else table.take(np.repeat(np.arange(len(counts)), counts))


def _output_schema(source: pa.Schema, plan: Layout, kept: Mapping[str, str], added: pa.Schema) -> pa.Schema:
    """prompt, chosen, rejected; the input's other columns; then what is added."""
    fields = {name: pa.field(name, type_) for name, type_ in plan.built.items()}
    fields |= {kept[name]: source.field(name).with_name(kept[name]) for name in source.names}
    first = [fields.pop(name) for name in TEXTS if name in fields]
    return pa.schema([*first, *fields.values(), *added])
