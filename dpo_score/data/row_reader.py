"""Reading the rows of one file from any row on: Parquet, Arrow, JSON lines, JSON arrays, CSV and TSV.

Opening a file gives its number of rows and the shape of every column, over all of its rows. Memory stays flat:
Parquet and Arrow are decoded in batches and only in the columns asked for, also inside a single huge row group; a line
of text, and a value of a JSON array, is bounded before it is read.
A row that cannot be decoded is a `Problem` in its place; a file that cannot is a `DataError`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_score.data.column_types import Shape, Shapes, from_arrow, from_values
from dpo_score.data.files import UNREADABLE, kind_of, open_binary
from dpo_score.data.json_values import json_values
from dpo_score.data.layout import Located, without_packing
from dpo_score.data.types import Problem
from dpo_score.errors import DataError, client_errors
from dpo_score.escape import seen

BATCH_BYTES = 8 << 20
BATCH_ROWS = 1024
WORST_BATCH_BYTES = 1 << 30
"""A Parquet dictionary can hold one huge value for many rows: a batch should not decode to more than this."""
MAX_LINE = 128 << 20
"""Bytes of a line of JSON or CSV; a longer one is not read."""
MAX_DEPTH = 100
MAX_COLUMNS = 10_000
JSON_SAMPLE = 1000
SPREAD_SAMPLE = 64
SAMPLE_BYTES = 32 << 20
SAMPLE_TEXT = 10_000
"""Characters of a text that are kept where it is wanted for its type alone."""
_BOM = b"\xef\xbb\xbf"
_MOST = 1 << 63


class _Huge:
    """The kind of whole numbers that do not fit into 64 bits."""


_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What a damaged footer or page can raise."""

RawRow: TypeAlias = Mapping[str, Any] | Problem


class RowFile(Protocol):
    """A file of rows: how many, of what shapes, and a stream of them.

    `padded`: every struct of a column has the same keys, null where a row has none (Arrow), so nulls mean nothing.
    `mixed`: columns whose values are of several kinds, or are numbers too large for Arrow.
    """

    rows: int
    shapes: Shapes
    padded: bool
    mixed: frozenset[str]

    def stream(self, start: int, columns: Sequence[str]) -> Iterator[RawRow]:
        """The rows from `start` on, in order."""
        ...

    def picked(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[RawRow]:
        """The rows with these numbers, which ascend: one pass over the file, as much of it as they lie in."""
        ...

    def sample(self, columns: Sequence[str]) -> list[Mapping[str, Any]]:
        """Rows from the beginning and spread over the file: a sample to decide on for the whole set."""
        ...


def open_rows(file: Located) -> RowFile:
    """Raises DataError for what is not data, or is damaged."""
    kind = kind_of(file)
    if kind == "parquet":
        return ParquetRows(file.path)
    if kind == "arrow":
        return ArrowRows(file.path)
    if kind == "csv":
        return CsvRows(file.path, file.name)
    return JsonRows(file.path, whole=kind == "array")


# --- Parquet and Arrow: typed columns in batches ------------------------------------------------------------------


class ParquetRows:
    """Opened anew for every stream, so that nothing stays open between blocks of other files."""

    padded = True
    mixed: frozenset[str] = frozenset()

    def __init__(self, path: str) -> None:
        self.path = path
        with self._open() as opened:
            metadata, schema = opened.metadata, opened.schema_arrow
            self.rows: int = metadata.num_rows
            # No metadata of single columns: pyarrow aborts the process where a damaged footer contradicts itself there.
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            self._group_rows: list[int] = [group.num_rows for group in groups]
            total, largest = sum(g.total_byte_size for g in groups), max((g.total_byte_size for g in groups), default=1)
            by_mean, at_worst = BATCH_BYTES * self.rows // max(total, 1), WORST_BATCH_BYTES // max(largest, 1)
            self._batch_rows = max(1, min(BATCH_ROWS, by_mean, max(at_worst, 4)))
        self.shapes = _arrow_shapes(schema, path)

    def _open(self) -> pq.ParquetFile:
        try:
            source = self.path if "://" not in self.path else open_binary(self.path)
            return pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
        except client_errors(*_DAMAGE) as error:
            raise DataError(_damaged(self.path, error)) from None

    def stream(self, start: int, columns: Sequence[str]) -> Iterator[RawRow]:
        group, skip = self._position(start)
        with self._open() as opened:
            batches = self._batches(opened, list(range(group, len(self._group_rows))), columns)
            yield from _skipping(batches, skip)

    def picked(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[RawRow]:
        with self._open() as opened:
            for group, inside in groupby(map(self._position, rows), key=itemgetter(0)):
                yield from _at(self._batches(opened, [group], columns), [row for _, row in inside])

    def sample(self, columns: Sequence[str]) -> list[Mapping[str, Any]]:
        """The first rows of the file and of up to eight of its row groups."""
        starts, before = [], 0
        for count in self._group_rows:
            starts.append(before)
            before += count
        step = max(1, len(starts) // 8)
        found = first_rows(self.stream(0, columns), SPREAD_SAMPLE)
        for start in starts[step::step]:
            found += first_rows(self.stream(start, columns), SPREAD_SAMPLE // 4)
        return found

    def _batches(self, opened: pq.ParquetFile, groups: list[int], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        present = [name for name in columns if name in self.shapes]
        batches = opened.iter_batches(
            batch_size=self._batch_rows, row_groups=groups, columns=present, use_threads=False
        )
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


class ArrowRows:
    """An Arrow IPC file or stream, as the datasets library saves them. Read batch by batch."""

    padded = True
    mixed: frozenset[str] = frozenset()

    def __init__(self, path: str) -> None:
        self.path = path
        self.rows, schema = 0, None
        for batch in self._batches(None):
            self.rows, schema = self.rows + batch.num_rows, batch.schema
        if schema is None:
            with open_binary(path) as handle:
                schema = self._reader(handle).schema
        self.shapes = _arrow_shapes(schema, path)

    def stream(self, start: int, columns: Sequence[str]) -> Iterator[RawRow]:
        return _skipping(self._batches(columns), start)

    def picked(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[RawRow]:
        return _at(self._batches(columns), rows)

    def sample(self, columns: Sequence[str]) -> list[Mapping[str, Any]]:
        return _spread(self, columns)

    def _batches(self, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        try:
            with open_binary(self.path) as handle:
                for batch in self._reader(handle):
                    if columns is not None:
                        batch = batch.select([name for name in columns if name in batch.schema.names])
                    size = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1)))
                    yield from (batch.slice(at, size) for at in range(0, batch.num_rows, size))
        except client_errors(*_DAMAGE) as error:
            raise DataError(_damaged(self.path, error, "Arrow")) from None

    def _reader(self, handle: Any) -> Any:
        """The record batches of a stream (the datasets library) or of a file (pyarrow, polars)."""
        if handle.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(handle)
            return _FileBatches(reader)
        handle.seek(0)
        return pa.ipc.open_stream(handle)


class _FileBatches:
    def __init__(self, reader: pa.RecordBatchFileReader) -> None:
        self.schema, self._reader = reader.schema, reader

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return (self._reader.get_batch(i) for i in range(self._reader.num_record_batches))


def _arrow_shapes(schema: pa.Schema, path: str) -> Shapes:
    repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has more than one column called {', '.join(repeated)}: rename them.")
    try:
        return {field.name: from_arrow(field.type) for field in schema}
    except RecursionError:
        raise DataError(f"{path} has a column that is nested too deep to be read") from None


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
    """A batch as dictionaries; where a value cannot be decoded, only the rows that hold one become problems."""
    try:
        return list(batch.to_pylist())
    except (UnicodeDecodeError, ValueError, OverflowError, pa.ArrowException) as error:
        if batch.num_rows > 1:
            half = batch.num_rows // 2
            return _python_rows(batch.slice(0, half)) + _python_rows(batch.slice(half))
        if isinstance(error, UnicodeDecodeError):
            return [Problem("invalid_utf8", f"a string is not UTF-8: {error.reason}", None, repr(error.object[:200]))]
        return [Problem("wrong_type", f"a value cannot be decoded: {seen(str(error), 80)}", None)]


def _damaged(path: str, error: Exception, kind: str = "Parquet") -> str:
    return f"{path} cannot be read as {kind}: {seen(str(error), 160)}. If it is damaged, copy or download it again."


def first_rows(rows: Iterator[RawRow], count: int) -> list[Mapping[str, Any]]:
    """The first rows that can be decoded, at most `count`, and no more once they hold SAMPLE_BYTES."""
    found: list[Mapping[str, Any]] = []
    size = 0
    for row in islice(rows, count):
        if not isinstance(row, Problem):
            found.append(row)
            size += text_size(row)
        if size > SAMPLE_BYTES:
            break
    return found


def text_size(value: Any) -> int:
    """Characters of the strings of a cell or a row; other values count as what they print as."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(text_size, value.values()))
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float):
        return sum(map(text_size, value))
    return len(repr(value))


def shortened(value: Any) -> Any:
    """A cell with at most SAMPLE_TEXT characters of each text, and as many items of each list."""
    if isinstance(value, str | bytes):
        return value[:SAMPLE_TEXT]
    if isinstance(value, Mapping):
        return {key: shortened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shortened(inner) for inner in value[:SAMPLE_TEXT]]
    return value


def _spread(file: RowFile, columns: Sequence[str]) -> list[Mapping[str, Any]]:
    """The first rows, and as many evenly spread over the file."""
    step = max(1, file.rows // SPREAD_SAMPLE)
    numbers = sorted({*range(min(SPREAD_SAMPLE, file.rows)), *range(0, file.rows, step)})
    return first_rows(file.picked(numbers, columns), len(numbers))


# --- JSON ---------------------------------------------------------------------------------------------------------


class JsonRows:
    """JSON lines, or one JSON array, or objects printed over several lines. Blank lines are not rows.

    Every row is decoded once when the file is opened, because any row may bring a column that the others lack.
    """

    padded = False

    def __init__(self, path: str, whole: bool) -> None:
        self.path = path
        self._whole = whole or self._is_printed_over_lines()
        self.rows = 0
        kinds: dict[str, set[type]] = {}
        telling: list[Mapping[str, Any]] = []
        spread: list[Mapping[str, Any]] = []
        step, size, first_problem = 1, 0, None
        for raw in self._undecoded():
            row = self._decoded(raw)
            if isinstance(row, Problem):
                first_problem = first_problem or row.reason
            else:
                found = [
                    (key, _Huge if type(v) is int and not -_MOST <= v < _MOST else type(v)) for key, v in row.items()
                ]
                new = [(key, kind) for key, kind in found if kind not in kinds.get(key, ())]
                for key, kind in new:
                    kinds.setdefault(key, set()).add(kind)
                if new or (len(telling) < JSON_SAMPLE and size < SAMPLE_BYTES):
                    kept = row if size < SAMPLE_BYTES else {key: shortened(row[key]) for key, _ in new}
                    telling.append(kept)
                    size += text_size(kept)
                if self.rows % step == 0:
                    spread.append(row)
                    while len(spread) > SPREAD_SAMPLE or (len(spread) > 1 and text_size(spread) > 4 * SAMPLE_BYTES):
                        spread, step = spread[::2], 2 * step
            if len(kinds) > MAX_COLUMNS:
                raise DataError(f"{path} has more than {MAX_COLUMNS:,} different keys: they are values, not columns")
            self.rows += 1
        known = {key: types - {type(None)} for key, types in kinds.items()}
        self.mixed = frozenset(key for key, of in known.items() if (len(of) > 1 and of != {int, float}) or _Huge in of)
        common = from_values(telling)
        self.shapes: Shapes = common.fields if common.kind == "struct" else {}
        self._spread = (*telling[:SPREAD_SAMPLE], *spread)
        if not self.shapes and self.rows:
            why = f" ({first_problem})" if first_problem else ""
            count = min(self.rows, JSON_SAMPLE)
            raise DataError(f"{path}: none of the first {count} rows is a JSON object with columns{why}")

    def stream(self, start: int, columns: Sequence[str]) -> Iterator[RawRow]:
        return (self._decoded(row) for row in islice(self._undecoded(), start, None))

    def picked(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[RawRow]:
        wanted, last = frozenset(rows), max(rows, default=-1)
        for number, row in zip(range(last + 1), self._undecoded(), strict=False):
            if number in wanted:
                yield self._decoded(row)

    def sample(self, columns: Sequence[str]) -> list[Mapping[str, Any]]:
        return list(self._spread)

    def _is_printed_over_lines(self) -> bool:
        """Whether the first line begins an object that goes on, in a file that holds nothing but objects."""
        try:
            with open_binary(self.path) as handle:
                line = next((line for line in _lines(handle) if line is None or line.strip()), b"")
            json.loads(line or b"{}")
        except json.JSONDecodeError as error:
            if error.pos >= len(error.doc.rstrip()):
                try:
                    return sum(1 for _ in self._all_values()) > 0
                except DataError:
                    return False
        except client_errors(ValueError, RecursionError, *UNREADABLE):
            return False
        return False

    def _undecoded(self) -> Iterator[Any]:
        """Each line (None: one too long to be read), or each value of a file that is read whole."""
        if self._whole:
            yield from self._all_values()
            return
        try:
            with open_binary(self.path) as handle:
                yield from (line for line in _lines(handle) if line is None or line.strip())
        except client_errors(*UNREADABLE) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from None

    def _all_values(self) -> Iterator[Any]:
        """The items of one array, or the objects that follow each other in the file."""
        try:
            with open_binary(self.path) as handle:
                yield from json_values(handle)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8: {error.reason}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} is not one JSON array: {seen(str(error), 120)}") from None
        except client_errors(*UNREADABLE) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from None

    def _decoded(self, row: Any) -> RawRow:
        if row is None:
            return Problem("too_large", f"the line has more than {MAX_LINE:,} bytes")
        if not isinstance(row, bytes):
            value, brackets = row, MAX_DEPTH
        else:
            brackets = row.count(b"[") + row.count(b"{")
            try:
                value = json.loads(row)
            except UnicodeDecodeError as error:
                return Problem("invalid_utf8", f"the line is not UTF-8: {error.reason}", None, repr(row[:200]))
            except (ValueError, RecursionError) as error:
                text = row[:200].decode("utf-8", "replace")
                return Problem("invalid_json", f"the line is not JSON: {seen(str(error), 80)}", None, text)
        if not isinstance(value, Mapping):
            return Problem("invalid_json", "not a JSON object", None, value)
        if brackets >= MAX_DEPTH and is_too_deep(value):
            return Problem("too_large", f"a value is nested more than {MAX_DEPTH} levels deep")
        return value


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than MAX_DEPTH levels deep. Walks without recursion."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for part in level
            if isinstance(part, list | dict)
            for item in (part.values() if isinstance(part, dict) else part)
        ]
        if not level:
            return False
    return True


def _lines(handle: Any) -> Iterator[bytes | None]:
    """The lines of a binary file; None for one of more than MAX_LINE bytes, which is passed over piece by piece."""
    pending: list[bytes] = []
    size, first = 0, True
    while piece := handle.read(1 << 20):
        if first:
            piece, first = piece.removeprefix(_BOM), False
        *ended, rest = piece.split(b"\n")
        for line in ended:
            yield b"".join((*pending, line)) if size + len(line) <= MAX_LINE else None
            pending, size = [], 0
        size += len(rest)
        pending = [*pending, rest] if size <= MAX_LINE else []
    if size:
        yield b"".join(pending) if size <= MAX_LINE else None


# --- CSV and TSV --------------------------------------------------------------------------------------------------

_WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?")
_TEXT_COLUMNS = re.compile(
    r"(prompt|question|instruction|input|output|query|history|context|system|chosen|rejected|response|answer|completion"
    r"|text|message|conversation|id$)",
    re.IGNORECASE,
)
"""Columns of these names stay text, even where every value is a number."""


class CsvRows:
    """CSV or TSV in UTF-8 with a line of column names. An empty cell is null.

    A column without a name, as pandas leaves over its index, is called by its number.

    A column in which every value is a number is one of numbers, unless its name is that of a text (a prompt may be
    "12"); every other column is text. TSV is separated by tabs, CSV by commas, or by semicolons or tabs where the line
    of column names has more of them.
    """

    padded = False
    mixed: frozenset[str] = frozenset()

    def __init__(self, path: str, name: str) -> None:
        self.path = path
        self._delimiter = "\t" if without_packing(name).endswith(".tsv") else ","
        with open_binary(path) as handle:
            head = (next(_lines(handle), b"") or b"").decode("utf-8", "replace")
        if self._delimiter == ",":
            self._delimiter = max(",;\t", key=head.count)
        named = next(csv.reader([head], delimiter=self._delimiter), [])
        self._names = [name or f"column {number}" for number, name in enumerate(named, 1)]
        if len(set(self._names)) < len(self._names) or not any(named):
            raise DataError(f"{path}: its first line must name the columns, each name once: {seen(head, 120)!r}")
        self._kinds: dict[str, str] = {}
        numbers = {column: "int" for column in self._names if not _TEXT_COLUMNS.search(column)}
        filled: set[str] = set()
        self.rows = 0
        for row in self._undecoded():
            self.rows += 1
            if isinstance(row, Problem):
                continue
            for column, value in row.items():
                if value is None:
                    continue
                filled.add(column)
                if column in numbers and not _WHOLE_NUMBER.fullmatch(value):
                    numbers[column] = "float"
                    if not _NUMBER.fullmatch(value):
                        del numbers[column]
        self._kinds = {column: kind for column, kind in numbers.items() if column in filled}
        kinds: dict[str, Any] = {**dict.fromkeys(self._names, "text"), **self._kinds}
        self.shapes: Shapes = {column: Shape(kinds[column] if column in filled else "null") for column in self._names}

    def stream(self, start: int, columns: Sequence[str]) -> Iterator[RawRow]:
        return islice(self._undecoded(), start, None)

    def picked(self, rows: Sequence[int], columns: Sequence[str]) -> Iterator[RawRow]:
        wanted, last = frozenset(rows), max(rows, default=-1)
        return (row for number, row in zip(range(last + 1), self._undecoded(), strict=False) if number in wanted)

    def sample(self, columns: Sequence[str]) -> list[Mapping[str, Any]]:
        return _spread(self, columns)

    def _undecoded(self) -> Iterator[Any]:
        csv.field_size_limit(MAX_LINE)
        try:
            with io.TextIOWrapper(
                open_binary(self.path), encoding="utf-8-sig", errors="surrogateescape", newline=""
            ) as text:
                reader = csv.reader(self._lines(text), delimiter=self._delimiter)
                next(reader, None)
                last = reader.line_num
                for cells in reader:
                    if cells:
                        yield self._row(cells, last + 1, reader.line_num)
                    last = reader.line_num
        except csv.Error as error:
            raise DataError(
                f"{self.path}: line {reader.line_num} is not CSV: {error}. Look for a quote that is never closed"
            ) from None
        except client_errors(*UNREADABLE) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from None

    def _lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        """The lines as they are, with their ends. A line without an end would be read whole."""
        number = 0
        while line := text.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                raise DataError(f"{self.path}: line {number} has more than {MAX_LINE:,} characters: it is not CSV")
            yield line

    def _row(self, cells: list[str], first: int, last: int) -> RawRow:
        """The row that the lines from `first` to `last` of the file hold."""
        if len(cells) != len(self._names):
            where = f"line {first} has" if first == last else f"lines {first} to {last} (a quote is never closed?) have"
            reason = f"{where} {len(cells)} cells, but there are {len(self._names)} columns"
            return Problem("invalid_csv", reason, None, self._delimiter.join(cells)[:200])
        row: dict[str, Any] = {}
        for column, cell in zip(self._names, cells, strict=True):
            kind = self._kinds.get(column)
            row[column] = None if not cell else int(cell) if kind == "int" else float(cell) if kind == "float" else cell
        return row
