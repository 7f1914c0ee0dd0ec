"""The rows of the data files with all their columns, as Arrow, by global row number.

Promises: values of a Parquet file are passed on as they are stored, never through Python; memory holds one batch;
rows may be asked for in ascending order without reading anything twice. A JSON file gets the Arrow types that all
its rows share; a column without one type is passed on as JSON text. Rows that cannot be decoded are null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo_score.data.column_types import Shape, from_values
from dpo_score.data.dataset import DataFile, Dataset
from dpo_score.data.files import open_binary
from dpo_score.data.row_reader import BATCH_BYTES, BATCH_ROWS, ParquetRows
from dpo_score.errors import DataError
from dpo_score.storage.parquet import fitted

SCALARS = {"text": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "null": pa.null()}


def source_schema(dataset: Dataset) -> pa.Schema:
    """Every column of any file of a set. DataError where files have one column in types without a common one."""
    schemas = [file_schema(file) for file in dataset.files]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"data set {dataset.spec.name!r}: its files hold one column in different types, so they cannot be written "
            f"as one set ({str(error)[:200]}). Give them as sets of their own"
        ) from None


def file_schema(file: DataFile) -> pa.Schema:
    """Columns and types of one file, without the metadata that other programs left in it."""
    if isinstance(file.content, ParquetRows):
        with _open(file) as opened:
            return opened.schema_arrow.remove_metadata()
    shape = from_values(row for row in file.content.stream(0, []) if isinstance(row, Mapping))
    return pa.schema([(name, arrow_type(inner)) for name, inner in shape.fields.items()])


def arrow_type(shape: Shape) -> pa.DataType:
    """The Arrow type of decoded JSON; what has no type of its own becomes text."""
    if shape.kind == "list" and shape.item is not None:
        return pa.list_(arrow_type(shape.item))
    if shape.kind == "struct" and shape.fields:
        return pa.struct([(name, arrow_type(inner)) for name, inner in shape.fields.items()])
    return SCALARS.get(shape.kind, pa.string())


class OriginalRows:
    """Reads rows forward; asking for an earlier row than before starts the file again."""

    def __init__(self, dataset: Dataset, schema: pa.Schema, first_row: int) -> None:
        """`first_row`: number of the set's first row among all sets; `schema` from `source_schema`."""
        self._schema = schema
        starts = [first_row]
        for file in dataset.files:
            starts.append(starts[-1] + file.rows)
        self._places = list(zip(dataset.files, starts[:-1], starts[1:], strict=True))
        self._cursors: dict[int, _Cursor] = {}

    def take(self, rows: Sequence[int]) -> pa.Table:
        """One row for each of `rows` (ascending, all of this set); where several are read together, the first."""
        parts = []
        for index, (file, start, stop) in enumerate(self._places):
            wanted = [file.first_row(row - start) for row in rows if start <= row < stop]
            if wanted:
                found = self._cursor(index, file, wanted[0]).take(wanted)
                parts.append(fitted(readable(found), self._schema))
        return pa.concat_tables(parts) if parts else self._schema.empty_table()

    def _cursor(self, index: int, file: DataFile, first: int) -> _Cursor:
        found = self._cursors.get(index)
        if found is None or found.start > first:
            found = _Cursor(_batches(file, first, self._schema), first)
            self._cursors = {index: found}
        return found


class _Cursor:
    """A stream of batches; `start` is the file row that its current batch begins with."""

    def __init__(self, batches: Iterator[pa.Table], start: int) -> None:
        self._batches, self.start = batches, start
        self._batch: pa.Table | None = None

    def take(self, rows: Sequence[int]) -> pa.Table:
        parts, left = [], list(rows)
        while left:
            batch = self._current(left[0])
            here = [row for row in left if row < self.start + batch.num_rows]
            parts.append(_picked(batch, [row - self.start for row in here]))
            left = left[len(here) :]
        return pa.concat_tables(parts)

    def _current(self, row: int) -> pa.Table:
        """The batch that holds `row`."""
        while self._batch is None or row >= self.start + self._batch.num_rows:
            if self._batch is not None:
                self.start += self._batch.num_rows
            self._batch = next(self._batches)
        return self._batch


def _picked(batch: pa.Table, places: Sequence[int]) -> pa.Table:
    """Rows that follow each other are not copied."""
    if places[-1] - places[0] + 1 == len(places):
        return batch.slice(places[0], len(places))
    return batch.take(pa.array(places, pa.int64()))


def _batches(file: DataFile, start: int, schema: pa.Schema) -> Iterator[pa.Table]:
    if isinstance(file.content, ParquetRows):
        yield from _parquet_batches(file, start)
    else:
        yield from _json_batches(file, start, schema)


def _parquet_batches(file: DataFile, start: int) -> Iterator[pa.Table]:
    with _open(file) as opened:
        metadata, skip, group = opened.metadata, start, 0
        while group < metadata.num_row_groups and skip >= metadata.row_group(group).num_rows:
            skip -= metadata.row_group(group).num_rows
            group += 1
        groups = range(group, metadata.num_row_groups)
        bytes_ = sum(metadata.row_group(i).total_byte_size for i in groups)
        rows = sum(metadata.row_group(i).num_rows for i in groups)
        size = max(1, min(BATCH_ROWS, int(BATCH_BYTES * rows / max(bytes_, 1))))
        for batch in opened.iter_batches(batch_size=size, row_groups=list(groups), use_threads=False):
            table = pa.Table.from_batches([batch]).slice(min(skip, batch.num_rows))
            skip = max(skip - batch.num_rows, 0)
            if table.num_rows:
                yield table.replace_schema_metadata(None)


def _json_batches(file: DataFile, start: int, schema: pa.Schema) -> Iterator[pa.Table]:
    rows: list[Mapping[str, Any]] = []
    for number, row in enumerate(file.content.stream(0, [])):
        if number >= start:
            rows.append(row if isinstance(row, Mapping) else {})
        if len(rows) == BATCH_ROWS:
            yield json_table(rows, schema)
            rows = []
    if rows:
        yield json_table(rows, schema)


def json_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Decoded JSON rows as a table; text columns hold JSON where the value is not text."""
    plain = [{field.name: _typed(row.get(field.name), field.type) for field in schema} for row in rows]
    return pa.Table.from_pylist(plain, schema=schema)


def _typed(value: Any, type_: pa.DataType) -> Any:
    if value is None or pa.types.is_null(type_):
        return None
    if pa.types.is_string(type_):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if pa.types.is_list(type_):
        return [_typed(item, type_.value_type) for item in value]
    if pa.types.is_struct(type_):
        return {field.name: _typed(value.get(field.name), field.type) for field in type_}
    return value


def _open(file: DataFile) -> Any:
    source = file.path if "://" not in file.path else open_binary(file.path)
    return pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)


def readable(table: pa.Table) -> pa.Table:
    """`table` with null wherever a string is not UTF-8, which no reader of the output could decode."""
    for index, column in enumerate(table.columns):
        if not _is_valid(column):
            sound = pa.array([_is_valid(column.slice(row, 1)) for row in range(len(column))])
            nulled = pc.if_else(sound, column, pa.scalar(None, column.type))
            table = table.set_column(index, table.field(index), nulled)
    return table


def _is_valid(column: pa.ChunkedArray) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True
