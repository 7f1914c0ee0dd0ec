"""The only code that writes under OUT and CACHE: each effect on a disk or an object store is one function below.

Tests count these calls, make them fail and kill the process between them by replacing the names of this module;
`local` and `object_store` therefore call them through the module. Only lock files are opened elsewhere, by `filelock`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

BUFFER_BYTES = 1 << 20


def create(path: Path) -> int:
    """A new file open for writing; never an existing one, never through a symbolic link."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def fsync(fd: int) -> None:
    os.fsync(fd)


def replace(source: Path, target: Path) -> None:
    source.replace(target)


def unlink(path: Path) -> None:
    path.unlink()


def make_dir(path: Path) -> None:
    path.mkdir(exist_ok=True)


def fsync_dir(path: Path) -> None:
    """Make the entries of a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Sink:
    """A file being written: buffered, hashed, and file-like enough for pyarrow."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = bytearray()
        self._hash = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._buffer += view
        self.size += len(view)
        if len(self._buffer) >= BUFFER_BYTES:
            self._spill()
        return len(view)

    def _spill(self) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        self._hash.update(data)
        write(self._fd, data)

    def sync(self) -> str:
        """Everything on the device; the sha256 of it."""
        if self._buffer:
            self._spill()
        fsync(self._fd)
        return self._hash.hexdigest()

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Nothing: `sync` decides when bytes leave the buffer."""

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._fd)


def put(fs: Any, path: str, source: bytes | Path, if_absent: bool = False) -> None:
    """One object, whole or not at all: bytes, or a local file.

    Bytes with `if_absent`: a conditional PUT, FileExistsError when there is one.
    """
    if isinstance(source, Path):
        fs.put_file(str(source), path)
    else:
        fs.pipe_file(path, source, mode="create" if if_absent else "overwrite")


def delete(fs: Any, path: str) -> None:
    fs.rm_file(path)
