"""Streaming the rows of one file from any row on: Parquet by row group, JSON lines by line.

Memory stays flat: Parquet is decoded in batches of at most BATCH_BYTES (by the footer's sizes) and only in the columns
asked for, also inside a single huge row group. A JSON array is the exception: it has to be read whole.
A row that cannot be decoded is a `Problem` in its place; a file that cannot is a `DataError`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_score.data.column_types import Shapes, from_arrow, from_values
from dpo_score.data.files import kind_of, open_binary
from dpo_score.data.layout import Located
from dpo_score.data.types import Problem
from dpo_score.errors import DataError, client_errors
from dpo_score.escape import seen

BATCH_BYTES = 8 << 20
BATCH_ROWS = 1024
JSON_SAMPLE = 1000

_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What a damaged footer or page can raise."""

RawRow: TypeAlias = Mapping[str, Any] | Problem


class RowFile(Protocol):
    """A file of rows: how many, of what shapes, and a stream of them.

    `padded`: every struct of a column has the same keys, null where a row has none (Arrow), so nulls mean nothing.
    """

    rows: int
    shapes: Shapes
    padded: bool

    def stream(self, start: int, columns: Sequence[str]) -> Iterator[RawRow]:
        """The rows from `start` on, in order."""
        ...

    def picked(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[RawRow]:
        """The rows with these numbers, which ascend: one pass over the file, as much of it as they lie in."""
        ...


def open_rows(file: Located) -> RowFile:
    """Raises DataError for what is neither Parquet nor JSON, or is damaged."""
    kind = kind_of(file)
    if kind == "parquet":
        return ParquetRows(file.path)
    return JsonRows(file.path, whole=kind == "array")


class ParquetRows:
    """Opened anew for every stream, so that nothing stays open between blocks of other files."""

    padded = True

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._read_footer()
        except client_errors(*_DAMAGE) as error:
            raise DataError(_damaged(path, error)) from None

    def _read_footer(self) -> None:
        with self._open() as opened:
            metadata, schema = opened.metadata, opened.schema_arrow
            self.rows: int = metadata.num_rows
            # No metadata of single columns: pyarrow aborts the process where a damaged footer contradicts itself there.
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            self._group_rows: list[int] = [group.num_rows for group in groups]
            self._bytes: int = sum(group.total_byte_size for group in groups)
        _refuse_repeated(schema.names, self.path)
        self.shapes: Shapes = {field.name: from_arrow(field.type) for field in schema}

    def _open(self) -> pq.ParquetFile:
        try:
            source = self.path if "://" not in self.path else open_binary(self.path)
            return pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
        except client_errors(*_DAMAGE) as error:
            raise DataError(_damaged(self.path, error)) from None

    def stream(self, start: int, columns: Sequence[str]) -> Iterator[RawRow]:
        group, skip = self._position(start)
        groups = list(range(group, len(self._group_rows)))
        present = [name for name in columns if name in self.shapes]
        with self._open() as opened:
            batches = opened.iter_batches(
                batch_size=self._batch_rows(), row_groups=groups, columns=present, use_threads=False
            )
            yield from _skipping(self._rows_of(batches), skip)

    def picked(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[RawRow]:
        present = [name for name in columns if name in self.shapes]
        with self._open() as opened:
            for group, inside in groupby(map(self._position, rows), key=itemgetter(0)):
                batches = opened.iter_batches(
                    batch_size=self._batch_rows(), row_groups=[group], columns=present, use_threads=False
                )
                yield from _at(self._rows_of(batches), [row for _, row in inside])

    def _rows_of(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            yield from batches
        except client_errors(*_DAMAGE) as error:
            raise DataError(_damaged(self.path, error)) from None

    def _position(self, row: int) -> tuple[int, int]:
        """The row group that holds `row`, and how many of its rows come before."""
        for group, count in enumerate(self._group_rows):
            if row < count:
                return group, row
            row -= count
        return len(self._group_rows), 0

    def _batch_rows(self) -> int:
        """Rows that decode to about BATCH_BYTES, all columns counted."""
        return max(1, min(BATCH_ROWS, BATCH_BYTES * self.rows // max(self._bytes, 1)))


def _skipping(batches: Iterator[pa.RecordBatch], skip: int) -> Iterator[RawRow]:
    for batch in batches:
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        yield from _python_rows(batch.slice(skip))
        skip = 0


def _at(batches: Iterator[pa.RecordBatch], rows: Sequence[int]) -> Iterator[RawRow]:
    """Single rows by their ascending places in the batches, which are read no further than the last of them."""
    begin, wanted = 0, deque(rows)
    while wanted and (batch := next(batches, None)) is not None:
        while wanted and wanted[0] < begin + batch.num_rows:
            yield from _python_rows(batch.slice(wanted.popleft() - begin, 1))
        begin += batch.num_rows


def _python_rows(batch: pa.RecordBatch) -> list[RawRow]:
    """A batch as dictionaries; where bytes are not UTF-8, only the rows that hold them become problems."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows > 1:
            half = batch.num_rows // 2
            return _python_rows(batch.slice(0, half)) + _python_rows(batch.slice(half))
        return [Problem("invalid_utf8", f"a string is not UTF-8: {error.reason}", None, repr(error.object[:200]))]


def _refuse_repeated(names: Sequence[str], path: str) -> None:
    repeated = sorted({name for name in names if list(names).count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise DataError(f"{path} has more than one column called {', '.join(repeated)}: rename them.")


def _damaged(path: str, error: Exception) -> str:
    return f"{path} cannot be read as Parquet: {seen(str(error), 160)}. If it is damaged, copy or download it again."


class JsonRows:
    """JSON lines, or one JSON array of objects. Blank lines are not rows."""

    padded = False

    def __init__(self, path: str, whole: bool) -> None:
        self.path, self.whole = path, whole
        self.rows = 0
        sample: list[RawRow] = []
        for row in self._undecoded():
            self.rows += 1
            if len(sample) < JSON_SAMPLE:
                sample.append(self._parsed(row))
        found = from_values(row for row in sample if isinstance(row, Mapping))
        self.shapes: Shapes = found.fields if found.kind == "struct" else {}
        if not self.shapes and self.rows:
            raise DataError(f"{path}: none of the first {len(sample)} rows is a JSON object with columns")

    def stream(self, start: int, columns: Sequence[str]) -> Iterator[RawRow]:
        for number, row in enumerate(self._undecoded()):
            if number >= start:
                yield self._parsed(row)

    def picked(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[RawRow]:
        wanted, last = frozenset(rows), max(rows, default=-1)
        for number, row in zip(range(last + 1), self._undecoded(), strict=False):
            if number in wanted:
                yield self._parsed(row)

    def _undecoded(self) -> Iterator[Any]:
        """Each line, or each element of the array, which has been decoded."""
        try:
            with open_binary(self.path) as handle:
                if self.whole:
                    yield from self._array(handle.read())
                else:
                    yield from (line for line in handle if line.strip())
        except client_errors(OSError, EOFError) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from None

    def _array(self, content: bytes) -> list[Any]:
        try:
            items = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} is not one JSON array: {seen(str(error), 120)}") from None
        return items if isinstance(items, list) else [items]

    def _parsed(self, row: Any) -> RawRow:
        if self.whole:
            return row if isinstance(row, Mapping) else Problem("invalid_json", "not a JSON object", None, row)
        try:
            value = json.loads(row)
        except UnicodeDecodeError as error:
            return Problem("invalid_utf8", f"the line is not UTF-8: {error.reason}", None, repr(row[:200]))
        except (ValueError, RecursionError) as error:
            text = row[:200].decode("utf-8", "replace")
            return Problem("invalid_json", f"the line is not JSON: {seen(str(error), 80)}", None, text)
        return value if isinstance(value, Mapping) else Problem("invalid_json", "not a JSON object", None, value)
