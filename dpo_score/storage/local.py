"""A store on a local disk.

    name ─▶ .work/<name>.tmp-… ─ write ─ fsync ─ reopen, check ─▶ replace ─▶ name ─ fsync_dir

Promises: a final name holds a complete, synced file or nothing; a failure at any call leaves the old state and
a StorageError. Not promised: rename and lock semantics of NFS or FUSE; the caller decides when two writers may
meet (`lock`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo_score.errors import DamageError, StorageError, UsageError
from dpo_score.storage import io as storage
from dpo_score.storage import locks
from dpo_score.storage import parquet as tables
from dpo_score.storage import paths as names
from dpo_score.storage.base import FileStat, WarningsTo, json_bytes, log, parse_json
from dpo_score.storage.faults import translated, unless_gone
from dpo_score.storage.io import Sink
from dpo_score.storage.parquet import FileRecord

FOREIGN_TEMP_SECONDS = 86_400.0
_unfinished: set[str] = set()
"""Names of the unfinished files this process is writing: a sweep leaves them alone."""


class LocalStore:
    """Files under a folder of a local disk. `root` may be a symbolic link; nothing below it may lead outside."""

    width = 1

    def __init__(self, root: str | Path, warnings_to: WarningsTo = log.warning) -> None:
        self.root = Path(os.path.realpath(root))
        self._warn = warnings_to
        self._unsyncable: set[Path] = set()

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    def path(self, name: str) -> Path:
        """Where `name` lies; UsageError when it, or a symbolic link on its way, leaves the store."""
        full = self.root / names.checked(name)
        if not Path(os.path.realpath(full)).is_relative_to(self.root):
            raise UsageError(f"{full} is a symbolic link that leads outside {self.root}; remove it or choose another")
        return full

    # writing

    def write_bytes(self, name: str, data: bytes, if_absent: bool = False) -> bool:
        """Atomic. With `if_absent`, False and no change when `name` exists (one winner among processes)."""
        with translated(self.root / name), self._mutex() if if_absent else nullcontext():
            if if_absent and self.exists(name):
                return False
            self._publish(name, lambda sink: sink.write(data))
            return True

    def write_json(self, name: str, obj: Any, if_absent: bool = False) -> bool:
        return self.write_bytes(name, json_bytes(obj), if_absent)

    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> FileRecord:
        """As `write_bytes`, for contents that need not fit in memory."""

        def fill(sink: Sink) -> int:
            for chunk in chunks:
                sink.write(chunk)
            return 0

        return self._publish(name, fill)

    def write_table(self, name: str, table: pa.Table, metadata: Mapping[str, str]) -> FileRecord:
        """One Parquet file, verified before it gets its name. `metadata` replaces the schema's own."""
        return self.write_tables(name, table.schema, [table], metadata)

    def write_tables(
        self,
        name: str,
        schema: pa.Schema,
        parts: Iterable[pa.Table],
        metadata: Mapping[str, str],
        group_rows: int = tables.ROW_GROUP_ROWS,
    ) -> FileRecord:
        """As `write_table`, part by part; row groups of at most `group_rows` rows, none spanning two parts."""
        schema = tables.canonical(schema, metadata)
        return self._publish(name, lambda sink: tables.encode(sink, schema, parts, group_rows), schema)

    def _publish(self, name: str, fill: Callable[[Sink], int], schema: pa.Schema | None = None) -> FileRecord:
        target, unfinished = self.path(name), names.temp_name(name)
        with translated(target):
            self._make_dirs(target.parent)
            with self._temp(unfinished) as temp:
                rows, size, digest = self._fill(temp, fill)
                self._check(temp, rows if schema is not None else 0, size, digest, schema)
                storage.replace(temp, target)
            self._sync_dir(target.parent)
        return FileRecord(name, size, rows if schema is not None else 0, digest)

    @contextmanager
    def _temp(self, name: str) -> Iterator[Path]:
        """An unfinished file: gone again unless it was renamed."""
        path = self.path(name)
        self._make_dirs(path.parent)
        _unfinished.add(path.name)
        published = False
        try:
            yield path
            published = True
        finally:
            _unfinished.discard(path.name)
            if not published:
                with suppress(OSError):
                    storage.unlink(path)

    @staticmethod
    def _fill(temp: Path, fill: Callable[[Sink], int]) -> tuple[int, int, str]:
        sink = Sink(storage.create(temp))
        try:
            rows = fill(sink)
            return rows, sink.size, sink.sync()
        finally:
            sink.close()

    @staticmethod
    def _check(temp: Path, rows: int, size: int, digest: str, schema: pa.Schema | None) -> None:
        with temp.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise StorageError(f"{temp}: {size} bytes written read back otherwise; the disk or its driver is faulty")
        if schema is not None:
            tables.check(temp, rows, schema)

    def _make_dirs(self, folder: Path) -> None:
        missing = [p for p in (folder, *folder.parents) if not p.exists()]
        for path in reversed(missing):
            storage.make_dir(path)
            self._sync_dir(path.parent)

    def _sync_dir(self, folder: Path) -> None:
        """fsync a folder; where the file system cannot (network mounts), say so once and go on."""
        try:
            storage.fsync_dir(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            if not self._unsyncable:
                self._warn(f"{folder}: this file system cannot sync folders; after a power cut re-run to check")
            self._unsyncable.add(folder)

    # reading

    def read_bytes(self, name: str) -> bytes:
        with translated(self.root / name):
            return self.path(name).read_bytes()

    def read_json(self, name: str) -> Any:
        return parse_json(self.read_bytes(name), self.url(name))

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        return tables.read(self.path(name), self.url(name), columns)

    def open_table(self, name: str) -> Any:
        """An open ParquetFile (close it), page checksums verified; read it inside `reading`."""
        with self.reading(name):
            return tables.open_parquet(self.path(name))

    def reading(self, name: str) -> AbstractContextManager[None]:
        """Faults and damage met inside, as this store's errors."""
        return tables.damage_named(self.url(name))

    def local_copy(self, name: str) -> Path:
        """A path to read or map the file at."""
        return self.path(name)

    def sha256(self, name: str) -> str:
        with translated(self.root / name), self.path(name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def exists(self, name: str) -> bool:
        with translated(self.root / name):
            return self.path(name).is_file()

    def stat(self, name: str) -> FileStat | None:
        """None when there is no such file."""
        path = self.path(name)
        with translated(path):
            try:
                found = path.stat()
            except FileNotFoundError:
                return None
        return FileStat(found.st_size, found.st_mtime)

    def list(self, prefix: str = "") -> tuple[str, ...]:
        """All files below a folder, sorted; `.work` only when asked for."""
        top = self.path(prefix) if prefix else self.root
        found = []
        for folder, folders, files in os.walk(top, onerror=unless_gone):
            if not prefix:
                folders[:] = [f for f in folders if f != names.WORK]
            found += [f"{folder}/{file}".removeprefix(f"{self.root}/") for file in files]
        return tuple(sorted(found))

    # removing

    def remove(self, name: str) -> None:
        """Durably; a file that is not there is no error."""
        path = self.path(name)
        if not os.path.lexists(path):
            return
        with translated(path), suppress(FileNotFoundError):
            storage.unlink(path)
            self._sync_dir(path.parent)

    def quarantine(self, name: str) -> str:
        """Move a damaged file aside, for inspection; returns where it now lies."""
        source, kept = self.path(name), names.quarantine_name(name)
        with translated(source):
            self._make_dirs(self.path(kept).parent)
            storage.replace(source, self.path(kept))
            self._sync_dir(self.path(kept).parent)
            self._sync_dir(source.parent)
        return kept

    def sweep(self) -> tuple[str, ...]:
        """Remove unfinished files of this machine's dead processes, and day-old ones of others; returns the names."""
        stale: list[str] = []
        with suppress(StorageError):  # the workshop of a shared cache may be closed to this user
            stale += [name for name in self.list(names.WORK) if self._is_stale(name)]
        for name in stale:
            self.remove(name)
        return tuple(stale)

    def _is_stale(self, name: str) -> bool:
        match = names.TEMP.search(name)
        if match is None:
            return False
        if match["machine"] != names.machine():
            found = self.stat(name)
            return found is not None and time.time() - found.modified > FOREIGN_TEMP_SECONDS
        if int(match["pid"]) == os.getpid():
            return Path(name).name not in _unfinished
        return not names.alive(int(match["pid"]))

    # one writer

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time: a second one gets a UsageError naming the first. Freed by the kernel on any death."""
        with self._whole():
            for path in sorted((self.root / names.WORK).glob("share-*.lock")):
                with locks.exclusive(path, partial(self._owner, path.stem)):
                    pass
            self.write_json(f"{names.WORK}/lock-owner.json", locks.owner())
            yield

    @contextmanager
    def share(self, name: str) -> Iterator[None]:
        """One of several runs that divide the work: shuts out whole runs, and another share of this name."""
        own = f"share-{name}"
        with ExitStack() as held:
            with self._whole(locks.SHARE_SECONDS):
                path = self.root / names.WORK / f"{own}.lock"
                held.enter_context(locks.exclusive(path, partial(self._owner, own)))
            self.write_json(f"{names.WORK}/{own}-owner.json", locks.owner())
            yield

    def turn(self) -> AbstractContextManager[None]:
        """For a holder of a share: alone among the shares, after waiting for those that came before."""
        return locks.exclusive(self.root / names.WORK / "turn.lock", dict, seconds=-1)

    @contextmanager
    def _whole(self, seconds: float = 0.0) -> Iterator[None]:
        with translated(self.root):
            self._make_dirs(self.root / names.WORK)
        with locks.exclusive(self.root / names.WORK / "lock", partial(self._owner, "lock"), seconds):
            yield

    def _owner(self, lock: str) -> Mapping[str, Any]:
        with suppress(StorageError, DamageError):
            found = self.read_json(f"{names.WORK}/{lock}-owner.json")
            return found if isinstance(found, dict) else {}
        return {}

    @contextmanager
    def _mutex(self) -> Iterator[None]:
        """A moment alone among processes, for create-if-absent."""
        self._make_dirs(self.root / names.WORK)
        with locks.moment(self.root / names.WORK / "create.lock"):
            yield

    def url(self, name: str = "") -> str:
        return str(self.root / name) if name else str(self.root)
