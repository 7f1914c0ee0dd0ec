"""What every store can do, on a local disk or an object store, and the JSON all of them write."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import pyarrow as pa

from dpo_score.errors import DamageError
from dpo_score.storage.parquet import ROW_GROUP_ROWS, FileRecord

__all__ = ["FileRecord", "FileStat", "Store", "WarningsTo", "json_bytes", "log", "parse_json"]
WarningsTo: TypeAlias = Callable[[str], None]
log = logging.getLogger("dpo_score")
JSON_BYTES = 1 << 28
JSON_DEPTH = 100
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{\]}]')
"""Strings, which may hold brackets, and the brackets outside of them."""


@dataclass(frozen=True, slots=True)
class FileStat:
    """Bytes, and seconds since 1970 of the last change."""

    size: int
    modified: float


class Store(Protocol):
    """Files under one root: a folder (`local.LocalStore`) or an object store (`object_store.RemoteStore`).

    Names are POSIX-relative. A name holds a whole file or nothing, also after a power cut. Every failure is a
    StorageError that names the file and the way out; bytes that are there but are not what was written are a
    DamageError. To add a kind of store, subclass this and open it in `open.py`.

    `width`: how many requests it is worth having under way at once; reading and removing may come from any thread.
    """

    width: int

    # writing

    def write_bytes(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        """Write a file. With `if_absent`: False, and no change, when it exists; of several processes one wins."""

    def write_json(self, name: str, obj: Any, if_absent: bool = False) -> bool:
        """As `write_bytes`, of the strict JSON of `obj`."""
        return self.write_bytes(name, json_bytes(obj), if_absent)

    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> FileRecord:
        """As `write_bytes`, for contents that need not fit in memory."""

    def write_table(self, name: str, table: pa.Table, metadata: Mapping[str, str]) -> FileRecord:
        """One Parquet file, read back before it gets its name. `metadata` replaces the schema's own."""
        return self.write_tables(name, table.schema, [table], metadata)

    def write_tables(
        self,
        name: str,
        schema: pa.Schema,
        parts: Iterable[pa.Table],
        metadata: Mapping[str, str],
        group_rows: int = ROW_GROUP_ROWS,
    ) -> FileRecord:
        """As `write_table`, part by part; row groups of at most `group_rows` rows, none spanning two parts."""

    # reading

    def read_bytes(self, name: str) -> bytes:
        """The whole file. StorageError when it is not there."""

    def read_json(self, name: str) -> Any:
        """The JSON in a file. DamageError when it is not strict JSON, or larger or deeper than is read."""
        return parse_json(self.read_bytes(name), self.url(name))

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet file, or some of its columns. DamageError when a page does not match its checksum."""

    def open_table(self, name: str) -> Any:
        """An open pyarrow ParquetFile, which the caller closes; read from it inside `reading`."""

    def reading(self, name: str) -> AbstractContextManager[None]:
        """What pyarrow raises inside the block, while it reads `name`, becomes this store's errors."""

    def local_copy(self, name: str) -> Path:
        """A path of this machine that the file can be read or mapped at. Only for files that never change."""

    def sha256(self, name: str) -> str:
        """The sha256 of the file's bytes, in hexadecimal."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file (a folder is none)."""

    def stat(self, name: str) -> FileStat | None:
        """Size and time of the file, None when there is none."""

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """Names of all files below a folder, sorted. Without `prefix` those of `.work` are left out."""

    # removing

    def remove(self, name: str) -> None:
        """Remove a file, durably. No error when there is none."""

    def quarantine(self, name: str) -> str:
        """Move a damaged file to `.work/quarantine` for inspection; returns its new name."""

    def sweep(self) -> tuple[str, ...]:
        """Remove unfinished files that dead processes left behind; returns their names."""

    # one writer at a time

    def lock(self) -> AbstractContextManager[None]:
        """Hold the store for a whole run. UsageError naming the holder when a run, or a share of one, holds it."""

    def share(self, name: str) -> AbstractContextManager[None]:
        """Hold share `name` of a run that several processes divide (`--blocks I/N`). Other shares go on beside it.

        UsageError naming the holder when a whole run holds the store, or another process holds the same share.
        """

    def turn(self) -> AbstractContextManager[None]:
        """For a holder of a share: alone among the shares, after waiting for those that asked before."""

    def url(self, name: str = "") -> str:
        """Where a file, or the whole store, is found by a person or another program: a path or a URL."""


def json_bytes(obj: Any) -> bytes:
    """Strict JSON with sorted keys, ASCII only (any text is kept, nothing reaches a terminal raw), one newline."""
    return (json.dumps(obj, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")


def parse_json(data: bytes, name: str) -> Any:
    """JSON that may come from anywhere. DamageError unless it is strict and within JSON_BYTES and JSON_DEPTH."""
    if len(data) > JSON_BYTES:
        raise DamageError(f"{name}: {len(data):,} bytes of JSON, more than the {JSON_BYTES:,} that are read")

    def refused(text: str) -> Any:
        raise ValueError(f"{text} is no number in JSON")

    depth = deepest = 0
    if data.count(b"[") + data.count(b"{") > JSON_DEPTH:
        for match in _BRACKETS.finditer(data):
            first = match[0][:1]
            depth += (first in b"[{") - (first in b"]}")
            deepest = max(deepest, depth)
    if deepest > JSON_DEPTH:
        raise DamageError(f"{name}: JSON nested {deepest:,} deep, more than the {JSON_DEPTH} that are read")
    try:
        return json.loads(data, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{name}: not JSON ({error})") from error
