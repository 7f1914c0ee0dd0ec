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
    """Files under one root. Names are POSIX-relative; every failure is a StorageError, broken bytes a DamageError.

    `width`: how many requests it is worth having under way at once; reading and removing may come from any thread.
    """

    width: int

    def write_bytes(self, name: str, data: bytes, if_absent: bool = False) -> bool: ...
    def write_json(self, name: str, obj: Any, if_absent: bool = False) -> bool: ...
    def write_table(self, name: str, table: pa.Table, metadata: Mapping[str, str]) -> FileRecord: ...
    def write_tables(
        self,
        name: str,
        schema: pa.Schema,
        parts: Iterable[pa.Table],
        metadata: Mapping[str, str],
        group_rows: int = ROW_GROUP_ROWS,
    ) -> FileRecord: ...
    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> FileRecord: ...
    def read_bytes(self, name: str) -> bytes: ...
    def read_json(self, name: str) -> Any: ...
    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table: ...
    def open_table(self, name: str) -> Any: ...
    def reading(self, name: str) -> AbstractContextManager[None]: ...
    def local_copy(self, name: str) -> Path: ...
    def sha256(self, name: str) -> str: ...
    def exists(self, name: str) -> bool: ...
    def stat(self, name: str) -> FileStat | None: ...
    def list(self, prefix: str = "") -> tuple[str, ...]: ...
    def remove(self, name: str) -> None: ...
    def quarantine(self, name: str) -> str: ...
    def sweep(self) -> tuple[str, ...]: ...
    def lock(self) -> AbstractContextManager[None]: ...
    def share(self, name: str) -> AbstractContextManager[None]: ...
    def turn(self) -> AbstractContextManager[None]: ...
    def url(self, name: str = "") -> str: ...


def json_bytes(obj: Any) -> bytes:
    """Strict JSON with sorted keys, ASCII only (any text survives, nothing reaches a terminal raw), one newline."""
    return (json.dumps(obj, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")


def parse_json(data: bytes, name: str) -> Any:
    """JSON that may come from anywhere. DamageError unless it is strict and within JSON_BYTES and JSON_DEPTH."""
    if len(data) > JSON_BYTES:
        raise DamageError(f"{name}: {len(data):,} bytes of JSON, more than the {JSON_BYTES:,} that are read")
    depth = deepest = 0
    if data.count(b"[") + data.count(b"{") > JSON_DEPTH:
        for match in _BRACKETS.finditer(data):
            first = match[0][:1]
            depth += (first in b"[{") - (first in b"]}")
            deepest = max(deepest, depth)
    if deepest > JSON_DEPTH:
        raise DamageError(f"{name}: JSON nested {deepest:,} deep, more than the {JSON_DEPTH} that are read")
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{name}: not JSON ({error})") from error


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")
