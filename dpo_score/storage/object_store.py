"""A store on an object store, through fsspec: s3://, gs://, memory://.

Promises: an object appears whole (one PUT, never a rename); tables are built and checked in a local spool folder
first; create-if-absent is a conditional PUT where the file system has one; one writer by lease. Requests that
fail in passing are retried by the client library with back-off. Not promised: a lease against clocks that differ
by minutes, or create-if-absent on stores without conditional PUT.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from dpo_score.errors import ConfigError
from dpo_score.storage import io as storage
from dpo_score.storage import locks
from dpo_score.storage import parquet as tables
from dpo_score.storage import paths as names
from dpo_score.storage.base import FileStat, Store, WarningsTo, log
from dpo_score.storage.faults import translated_remote
from dpo_score.storage.local import LocalStore
from dpo_score.storage.parquet import FileRecord


class RemoteStore(Store):
    """Objects under one URL. The spool folder is in the temporary folder of this machine and goes with the store."""

    width = 16

    def __init__(self, url: str, warnings_to: WarningsTo = log.warning) -> None:
        self._protocol = url.split("://", 1)[0]
        self._fs, self._root = _opened(url)
        self._warn = warnings_to
        spool = tempfile.mkdtemp(prefix="dpo-score-")
        weakref.finalize(self, shutil.rmtree, spool, ignore_errors=True)
        self._spool = LocalStore(spool, warnings_to)
        self._guard: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"RemoteStore({self.url()!r})"

    def url(self, name: str = "") -> str:
        return self._protocol + "://" + self._path(name).lstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{names.checked(name)}" if name else str(self._root)

    # writing

    def write_bytes(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        self._guard()
        with translated_remote(self.url(name)):
            try:
                storage.put(self._fs, self._path(name), data, if_absent)
            except FileExistsError:
                if not if_absent:
                    raise
                return False
        return True

    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> FileRecord:
        return self._upload(self._spool.write_chunks(name, chunks))

    def write_tables(
        self,
        name: str,
        schema: pa.Schema,
        parts: Iterable[pa.Table],
        metadata: Mapping[str, str],
        group_rows: int = tables.ROW_GROUP_ROWS,
    ) -> FileRecord:
        return self._upload(self._spool.write_tables(name, schema, parts, metadata, group_rows))

    def _upload(self, record: FileRecord) -> FileRecord:
        self._guard()
        try:
            with translated_remote(self.url(record.name)):
                storage.put(self._fs, self._path(record.name), self._spool.path(record.name))
        finally:
            self._spool.remove(record.name)
        return record

    # reading

    def read_bytes(self, name: str) -> bytes:
        with translated_remote(self.url(name)):
            data: bytes = self._fs.cat_file(self._path(name))
        return data

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        with translated_remote(self.url(name)), self._fs.open(self._path(name), "rb") as file:
            return tables.read(file, self.url(name), columns)

    def open_table(self, name: str) -> Any:
        with self.reading(name):
            return tables.open_parquet(self._fs.open(self._path(name), "rb"))

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        with translated_remote(self.url(name)), tables.damage_named(self.url(name)):
            yield

    def local_copy(self, name: str) -> Path:
        """The object in the spool folder, downloaded once: for names whose contents never change."""
        copy = self._spool.path(name)
        if not copy.exists():
            self._spool.write_chunks(name, self._chunks(name))
        return copy

    def _chunks(self, name: str) -> Iterator[bytes]:
        with translated_remote(self.url(name)), self._fs.open(self._path(name), "rb") as file:
            while chunk := file.read(storage.BUFFER_BYTES):
                yield chunk

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        for chunk in self._chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    def exists(self, name: str) -> bool:
        with translated_remote(self.url(name)):
            return bool(self._fs.isfile(self._path(name)))

    def stat(self, name: str) -> FileStat | None:
        with translated_remote(self.url(name)):
            try:
                found = self._fs.info(self._path(name))
                modified = found.get("LastModified") or self._fs.modified(self._path(name))
            except FileNotFoundError:
                return None
        return FileStat(int(found["size"]), modified.timestamp())

    def list(self, prefix: str = "") -> tuple[str, ...]:
        with translated_remote(self.url(prefix)):
            found = self._fs.find(self._path(prefix))
        below = sorted(path.removeprefix(f"{self._root}/") for path in found)
        return tuple(name for name in below if prefix or not name.startswith(f"{names.WORK}/"))

    # removing

    def remove(self, name: str) -> None:
        self._guard()
        with translated_remote(self.url(name)), suppress(FileNotFoundError):
            storage.delete(self._fs, self._path(name))

    def quarantine(self, name: str) -> str:
        kept = names.quarantine_name(name)
        self.write_bytes(kept, self.read_bytes(name))
        self.remove(name)
        return kept

    def sweep(self) -> tuple[str, ...]:
        """Nothing is ever unfinished here."""
        return ()

    # one writer

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time, by lease; every write checks that the lease still holds."""
        with locks.hold(self) as guard:
            locks.refuse_shares(self)
            with self._guarded(guard):
                yield

    @contextmanager
    def share(self, name: str) -> Iterator[None]:
        """One of several runs that divide the work: shuts out whole runs, and another share of this name."""
        with ExitStack() as held:
            with locks.hold(self, seconds=locks.LEASE_SHARE_SECONDS):
                guard = held.enter_context(locks.hold(self, f"share-{name}"))
            with self._guarded(guard):
                yield

    @contextmanager
    def turn(self) -> Iterator[None]:
        with locks.hold(self, "turn", seconds=math.inf):
            yield

    @contextmanager
    def _guarded(self, guard: Callable[[], None]) -> Iterator[None]:
        self._guard = guard
        try:
            yield
        finally:
            self._guard = lambda: None


def _opened(url: str) -> tuple[Any, str]:
    """The file system behind a URL, and the place in it. ConfigError when there is none for its scheme."""
    scheme = url.split("://", 1)[0]
    if scheme not in (known := fsspec.available_protocols()):
        raise ConfigError(f"{url}: no file system is known for {scheme}://; known: {', '.join(sorted(known))}")
    with translated_remote(url):
        try:
            fs, root = fsspec.core.url_to_fs(re.sub(r"(?<![:/])/+$", "", url), use_listings_cache=False)
        except ImportError as error:
            extra = " (pip install 'dpo-score[s3]')" if scheme in ("s3", "s3a") else ""
            raise ConfigError(f"{url}: a package that {scheme}:// needs is not installed: {error}{extra}") from None
        except (ValueError, TypeError, AttributeError) as error:  # schemes that lie over another one, or take a login
            raise ConfigError(f"{url} cannot be written to: {error}. Choose a folder, s3:// or gs://") from None
    return fs, str(root)
