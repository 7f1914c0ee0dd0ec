"""Parquet as this project writes it: zstd, page checksums, no times, the same bytes for the same table.

`check` accepts what `encode` wrote only when rows and schema are those written, and a flipped bit in a page is an error
when it is read. The bytes depend on the release of pyarrow. Nothing here opens a file for writing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_score.errors import DamageError
from dpo_score.storage.faults import explain, number_of

ROW_GROUP_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One finished file: its name inside the store, bytes, rows (0 where it has none), sha256 in hexadecimal."""

    name: str
    size: int
    rows: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> FileRecord:
        name, size, rows, sha256 = (fields[key] for key in ("name", "size", "rows", "sha256"))
        if not (isinstance(name, str) and isinstance(sha256, str) and type(size) is type(rows) is int):
            raise TypeError(f"a file is recorded as {fields!r:.100}")
        return cls(name, size, rows, sha256)


def canonical(schema: pa.Schema, metadata: Mapping[str, str]) -> pa.Schema:
    """`schema` with one spelling: exactly `metadata`, sorted, and list items named as Parquet names them.

    Arrow calls the items of a new list `item` and those of one that was read from Parquet `element`; the name is
    written to the file, so equal tables would have different bytes.
    """
    return pa.schema([_named(field) for field in schema], dict(sorted(metadata.items())) or None)


def _named(field: pa.Field, name: str | None = None) -> pa.Field:
    """`field` (renamed to `name`) with the same done to what it holds."""
    kind = field.type
    if pa.types.is_list(kind):
        kind = pa.list_(_named(kind.value_field, "element"))
    elif pa.types.is_large_list(kind):
        kind = pa.large_list(_named(kind.value_field, "element"))
    elif pa.types.is_struct(kind):
        kind = pa.struct([_named(inner) for inner in kind])
    return pa.field(name or field.name, kind, field.nullable)


def encode(sink: Any, schema: pa.Schema, tables: Iterable[pa.Table], row_group_rows: int = ROW_GROUP_ROWS) -> int:
    """Write `tables` (all of `schema`) as one Parquet file into `sink`; returns the rows written."""
    rows = 0
    options = {"compression": "zstd", "write_page_checksum": True, "write_statistics": True}
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for table in tables:
            writer.write_table(table.cast(schema), row_group_size=row_group_rows)
            rows += table.num_rows
    return rows


def check(path: Path, rows: int, schema: pa.Schema) -> None:
    """Reopen a file just written: DamageError unless its footer says `rows` rows of `schema`."""
    with damage_named(path), pq.ParquetFile(path) as file:
        found_rows, found_schema = file.metadata.num_rows, file.schema_arrow
    if found_rows != rows or not found_schema.equals(schema) or found_schema.metadata != schema.metadata:
        raise DamageError(
            f"{path}: wrote {rows} rows of {schema.names}, read back {found_rows} of {found_schema.names}"
        )


def open_parquet(source: Path | IO[bytes]) -> Any:
    """A ParquetFile that verifies page checksums."""
    return pq.ParquetFile(source, page_checksum_verification=True)


def read(source: Path | IO[bytes], name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in `source`, or only `columns` of it. DamageError naming `name` when its bytes do not hold."""
    with damage_named(name), open_parquet(source) as file:
        return file.read(columns=None if columns is None else list(columns))


@contextmanager
def damage_named(name: str | Path) -> Iterator[None]:
    """What pyarrow says of broken bytes, as a DamageError; an OSError with a number stays a fault of the device."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and number_of(error):
            raise explain(error, name) from error
        raise DamageError(f"{name}: damaged Parquet file ({error})") from error


def fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns of `schema`: missing ones null, types widened."""
    columns = [
        (column if (column := table[field.name]).type == field.type else column.cast(field.type))
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def common_schema(schemas: Iterable[pa.Schema]) -> pa.Schema | None:
    """One schema for all, or None where types have none in common."""
    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
