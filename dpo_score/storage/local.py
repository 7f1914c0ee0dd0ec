"""The store on a local disk.

    name ─▶ .work/<name>.tmp-… ─ write ─ fsync ─ reopen, check ─▶ replace ─▶ name ─ fsync_dir

A name holds a complete, synced file or nothing; a failure at any call leaves the old state and a StorageError. What NFS
or FUSE make of renames and locks is not checked; `lock` keeps two runs apart, and nothing else here does.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo_score.errors import DamageError, StorageError, UsageError
from dpo_score.storage import io as storage
from dpo_score.storage import locks
from dpo_score.storage import parquet as tables
from dpo_score.storage import paths as names
from dpo_score.storage.base import FileStat, Store, WarningsTo, log
from dpo_score.storage.faults import translated, unless_gone
from dpo_score.storage.io import Sink
from dpo_score.storage.parquet import FileRecord

FOREIGN_TEMP_SECONDS = 86_400.0
_unfinished: set[str] = set()
"""Names of the unfinished files this process is writing: a sweep leaves them alone."""


class LocalStore(Store):
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
        with translated(self.root / name), ExitStack() as alone:
            if if_absent:
                self._make_dirs(self.root / names.WORK)
                alone.enter_context(locks.moment(self.root / names.WORK / "create.lock"))
                if self.exists(name):
                    return False
            self._publish(name, lambda sink: sink.write(data))
            return True

    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> FileRecord:
        def fill(sink: Sink) -> int:
            for chunk in chunks:
                sink.write(chunk)
            return 0

        return self._publish(name, fill)

    def write_tables(
        self,
        name: str,
        schema: pa.Schema,
        parts: Iterable[pa.Table],
        metadata: Mapping[str, str],
        group_rows: int = tables.ROW_GROUP_ROWS,
    ) -> FileRecord:
        schema = tables.canonical(schema, metadata)
        return self._publish(name, lambda sink: tables.encode(sink, schema, parts, group_rows), schema)

    def _publish(self, name: str, fill: Callable[[Sink], int], schema: pa.Schema | None = None) -> FileRecord:
        """Let `fill` write an unfinished file, sync it, read it back, then give it its name."""
        target = self.path(name)
        with translated(target):
            self._make_dirs(target.parent)
            with self._temp(names.temp_name(name)) as temp:
                sink = Sink(storage.create(temp))
                try:
                    rows = fill(sink)
                    size, digest = sink.size, sink.sync()
                finally:
                    sink.close()
                with temp.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != digest:
                    raise StorageError(
                        f"{temp}: {size} bytes written read back otherwise; the disk or its driver is faulty"
                    )
                if schema is not None:
                    tables.check(temp, rows, schema)
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

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        return tables.read(self.path(name), self.url(name), columns)

    def open_table(self, name: str) -> Any:
        with self.reading(name):
            return tables.open_parquet(self.path(name))

    def reading(self, name: str) -> AbstractContextManager[None]:
        return tables.damage_named(self.url(name))

    def local_copy(self, name: str) -> Path:
        return self.path(name)

    def sha256(self, name: str) -> str:
        with translated(self.root / name), self.path(name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def exists(self, name: str) -> bool:
        with translated(self.root / name):
            return self.path(name).is_file()

    def stat(self, name: str) -> FileStat | None:
        path = self.path(name)
        with translated(path):
            try:
                found = path.stat()
            except FileNotFoundError:
                return None
        return FileStat(found.st_size, found.st_mtime)

    def list(self, prefix: str = "") -> tuple[str, ...]:
        top = self.path(prefix) if prefix else self.root
        found = []
        for folder, folders, files in os.walk(top, onerror=unless_gone):
            if not prefix:
                folders[:] = [f for f in folders if f != names.WORK]
            found += [f"{folder}/{file}".removeprefix(f"{self.root}/") for file in files]
        return tuple(sorted(found))

    # removing

    def remove(self, name: str) -> None:
        path = self.path(name)
        if not os.path.lexists(path):
            return
        with translated(path), suppress(FileNotFoundError):
            storage.unlink(path)
            self._sync_dir(path.parent)

    def quarantine(self, name: str) -> str:
        source, kept = self.path(name), names.quarantine_name(name)
        with translated(source):
            self._make_dirs(self.path(kept).parent)
            storage.replace(source, self.path(kept))
            self._sync_dir(self.path(kept).parent)
            self._sync_dir(source.parent)
        return kept

    def sweep(self) -> tuple[str, ...]:
        """Remove unfinished files of this machine's dead processes, and day-old ones of others; returns the names."""

        def is_stale(name: str) -> bool:
            match = names.TEMP.search(name)
            if match is None:
                return False
            if match["machine"] != names.machine():
                found = self.stat(name)
                return found is not None and time.time() - found.modified > FOREIGN_TEMP_SECONDS
            if int(match["pid"]) == os.getpid():
                return Path(name).name not in _unfinished
            return not names.alive(int(match["pid"]))

        stale: list[str] = []
        with suppress(StorageError):  # the work folder of a shared cache may be closed to this user
            stale += [name for name in self.list(names.WORK) if is_stale(name)]
        for name in stale:
            self.remove(name)
        return tuple(stale)

    # one writer

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One run at a time: a second one gets a UsageError naming the first. Freed by the kernel on any death."""
        with self._whole():
            for path in sorted((self.root / names.WORK).glob("share-*.lock")):
                with locks.exclusive(path, partial(self._busy, path.stem)):
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
                held.enter_context(locks.exclusive(path, partial(self._busy, own)))
            self.write_json(f"{names.WORK}/{own}-owner.json", locks.owner())
            yield

    def turn(self) -> AbstractContextManager[None]:
        return locks.exclusive(self.root / names.WORK / "turn.lock", partial(self._busy, "turn"), seconds=-1)

    @contextmanager
    def _whole(self, seconds: float = 0.0) -> Iterator[None]:
        with translated(self.root):
            self._make_dirs(self.root / names.WORK)
        with locks.exclusive(self.root / names.WORK / "lock", partial(self._busy, "lock"), seconds):
            yield

    def _busy(self, lock: str) -> UsageError:
        """The error that names who holds a lock."""
        holder: dict[str, Any] = {}
        with suppress(StorageError, DamageError):
            found = self.read_json(f"{names.WORK}/{lock}-owner.json")
            holder = found if isinstance(found, dict) else {}
        return locks.busy(self.root, holder)

    def url(self, name: str = "") -> str:
        return str(self.root / name) if name else str(self.root)
