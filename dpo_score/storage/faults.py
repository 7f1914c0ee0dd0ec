"""What the operating system refused, in words: every OSError of a store becomes one StorageError.

The message names the path, the meaning of the error number and the way out. Damage (bytes that are there
but are not what was written) is not a fault: it is a DamageError, raised where the bytes are read.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_score.errors import StorageError, client_errors

RESUME = "Nothing committed is lost: the same command resumes"
ROOM = f"{RESUME} once there is room"
RIGHTS = f"{RESUME} once this user may write there"
MEANINGS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("no space is left on the device", ROOM),
    errno.EDQUOT: ("the disk quota is used up", ROOM),
    errno.EFBIG: ("the file is larger than the file system or the limit of this process allows", ROOM),
    errno.EROFS: ("the file system is read-only", RIGHTS),
    errno.EACCES: ("permission denied", RIGHTS),
    errno.EPERM: ("operation not permitted", RIGHTS),
    errno.EIO: ("the device reported an input/output error", f"{RESUME} once the device is sound; look at its logs"),
    errno.EXDEV: ("a folder of the store lies on another file system", "Keep the whole store on one file system"),
    errno.ENOENT: ("it is not there", f"{RESUME} once it is back"),
    errno.ENOTDIR: ("a file is where a folder is needed", "Move that file away or choose another folder"),
    errno.ELOOP: ("a symbolic link is where a file is needed", "Move that link away or choose another folder"),
    errno.EMFILE: ("this process has too many open files", f"{RESUME} after `ulimit -n 4096`"),
    errno.ENAMETOOLONG: ("the path is too long", "Choose a shorter folder or policy name"),
}

KINDS: dict[type[OSError], int] = {
    FileNotFoundError: errno.ENOENT,
    PermissionError: errno.EACCES,
    TimeoutError: errno.ETIMEDOUT,
    ConnectionError: errno.ECONNRESET,
}
"""What an object store's error means when it carries no number."""


def number_of(error: OSError) -> int:
    """The error number, 0 when nothing tells."""
    return error.errno or next((number for kind, number in KINDS.items() if isinstance(error, kind)), 0)


def explain(error: OSError, path: str | Path) -> StorageError:
    """The StorageError for an OSError at `path`."""
    number = number_of(error)
    meaning, way_out = MEANINGS.get(number, (os.strerror(number) if number else str(error), RESUME))
    code = f" ({errno.errorcode[number]})" if number in errno.errorcode else ""
    return StorageError(f"{path}: {meaning}{code}. {way_out}.")


def unless_gone(error: OSError) -> None:
    """For a walk: a folder that is not there holds nothing; one that cannot be read might hold anything."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise explain(error, str(error.filename)) from error


@contextmanager
def translated(path: str | Path) -> Iterator[None]:
    """Turn an OSError raised inside into the StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        raise explain(error, path) from error


@contextmanager
def translated_remote(url: str) -> Iterator[None]:
    """As `translated`, for what the client libraries in use raise beside OSError (no route, no credentials)."""
    with translated(url):
        try:
            yield
        except client_errors() as error:
            if isinstance(error, OSError):
                raise
            raise StorageError(f"{url}: the object store cannot be used ({error}). {RESUME} once it can be") from error
