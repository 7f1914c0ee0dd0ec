"""Where a key lies: which row of which value file. A SQLite database, one for many value files.

    keys   key (16 bytes), file (number), row, without row ids: the table is its own index
    files  number, name, how many keys it holds

In: the keys of value files, or other indexes to merge. Out: the places of the keys that are asked for. An index is
written once and named by the digest of its bytes, so a damaged one is known before it is used; it can be deleted at any
time and is built again from the value files. Resident memory stays that of SQLite's page cache, however large it is.
"""

from __future__ import annotations

import hashlib
import sqlite3
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from dpo_score.errors import DamageError, StorageError
from dpo_score.storage.cache.blocks import KEY_BYTES
from dpo_score.storage.faults import translated

SUFFIX = ".sqlite"
QUERIES_AT_ONCE = 500
ROWS_AT_ONCE = 1 << 16
MERGED_AT_ONCE = 8
"""Indexes merged in one statement: SQLite attaches at most ten databases."""
SCHEMA = """
CREATE TABLE files (number INTEGER PRIMARY KEY, name TEXT NOT NULL, keys INTEGER NOT NULL);
CREATE TABLE keys (key BLOB, file INTEGER, row INTEGER, PRIMARY KEY (key, file, row)) WITHOUT ROWID;
"""
Place = tuple[bytes, str, int]
"""A key, the name of a value file that holds it, and its row there."""


class IndexGoneError(StorageError):
    """An index that was open when it was listed is not there any more: another process has merged it."""


class KeyIndex:
    """An open index.

    `files`: the names of the value files it covers; `size`: how many keys it holds; `listed`: (number, name, keys) of
    each of those files; `path`: where it lies, None in memory.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path | None = None) -> None:
        self.path, self._connection = path, connection
        self.listed: list[tuple[int, str, int]] = connection.execute("SELECT number, name, keys FROM files").fetchall()
        self.files = tuple(name for _, name, _ in self.listed)
        self.size = sum(keys for _, _, keys in self.listed)
        self._names = {number: name for number, name, _ in self.listed}
        weakref.finalize(self, connection.close)

    def find(self, keys: Collection[bytes]) -> Iterator[Place]:
        """Every place of every key that is there, in the order of the keys' bytes."""
        asked = sorted(keys)
        for start in range(0, len(asked), QUERIES_AT_ONCE):
            part = asked[start : start + QUERIES_AT_ONCE]
            marks = ",".join("?" * len(part))
            query = f"SELECT key, file, row FROM keys WHERE key IN ({marks}) ORDER BY key, file, row"  # noqa: S608
            for key, file, row in self._connection.execute(query, part):
                yield key, self._names[file], row


def in_memory(files: Mapping[str, NDArray[np.uint8]]) -> KeyIndex:
    """An index of a few value files, without a file of its own. `files`: name → its keys, (N, 16), in row order."""
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    _fill(connection, files)
    return KeyIndex(connection)


def write(path: Path, files: Mapping[str, NDArray[np.uint8]]) -> None:
    """A new index file of value files; all their keys are sorted in memory at once."""
    with translated(path), closing(_created(path)) as connection:
        _fill(connection, files)


def _created(path: Path) -> sqlite3.Connection:
    """A database that no other process sees before it is whole: nothing is gained by a journal or by syncing."""
    connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}", uri=True, isolation_level=None)
    connection.execute("PRAGMA journal_mode=OFF")
    connection.execute("PRAGMA synchronous=OFF")
    return connection


def _fill(connection: sqlite3.Connection, files: Mapping[str, NDArray[np.uint8]]) -> None:
    """Rows in the order of their keys, so that the tree grows at its end alone."""
    connection.executescript(SCHEMA)
    lengths = [len(keys) for keys in files.values()]
    keys = np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *files.values()])
    words = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal keys stay in the order of files and rows
    numbers = np.repeat(np.arange(len(files)), lengths)
    rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(length) for length in lengths)])
    connection.execute("BEGIN")
    listed = [(number, name, len(own)) for number, (name, own) in enumerate(files.items())]
    connection.executemany("INSERT INTO files VALUES (?, ?, ?)", listed)
    for start in range(0, len(order), ROWS_AT_ONCE):
        part = order[start : start + ROWS_AT_ONCE]
        data = keys[part].tobytes()
        blobs = [data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES)]
        places = zip(blobs, numbers[part].tolist(), rows[part].tolist(), strict=True)
        connection.executemany("INSERT INTO keys VALUES (?, ?, ?)", places)
    connection.execute("COMMIT")


def opened(path: Path) -> KeyIndex:
    """An index file, read in place. StorageError when it is not there (any more), DamageError when it is no index."""
    connection = None
    try:
        connection = sqlite3.connect(_where(path), uri=True, check_same_thread=False)
        return KeyIndex(connection, path)
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        with translated(path):
            path.stat()
        raise DamageError(f"{path}: not an index of keys ({error})") from error


def _where(path: Path) -> str:
    """The URI of a file that is only read and never changes."""
    return f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"


def file_name(path: Path) -> str:
    """The name that the index in `path` is kept under: the digest of its bytes."""
    with translated(path), path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest() + SUFFIX


def merge(path: Path, indexes: Sequence[KeyIndex], keep: Collection[str]) -> None:
    """A new index file of all that index files hold, in one pass over each.

    Value files outside `keep` are left out, and so is one that an earlier index already covers. IndexGoneError when an
    index is not there any more.
    """
    taken = set[str]()
    with translated(path), closing(_created(path)) as connection:
        connection.executescript(SCHEMA + "CREATE TEMP TABLE renamed (source INTEGER, old INTEGER, new INTEGER);")
        connection.execute("CREATE UNIQUE INDEX temp.by_old ON renamed (source, old)")
        for start in range(0, len(indexes), MERGED_AT_ONCE):
            _append(connection, indexes[start : start + MERGED_AT_ONCE], keep, taken)


def _append(connection: sqlite3.Connection, group: Sequence[KeyIndex], keep: Collection[str], taken: set[str]) -> None:
    """Add what `group` holds. SQLite merges its tables as they are read, since each is in the order of its keys."""
    selects = []
    for source, index in enumerate(group):
        assert index.path is not None, "only index files are merged"
        try:
            connection.execute(f"ATTACH ? AS source{source}", [_where(index.path)])
        except sqlite3.OperationalError as error:
            raise IndexGoneError(f"{index.path}: {error}") from error
        for old, name, keys in index.listed:
            if name in keep and name not in taken:
                connection.execute("INSERT INTO temp.renamed VALUES (?, ?, ?)", [source, old, len(taken)])
                connection.execute("INSERT INTO main.files VALUES (?, ?, ?)", [len(taken), name, keys])
                taken.add(name)
        rows = f"source{source}.keys CROSS JOIN temp.renamed ON source = {source} AND old = file"
        selects.append(f"SELECT key, new, row FROM {rows}")  # noqa: S608
    connection.execute("BEGIN")
    connection.execute("INSERT INTO main.keys " + " UNION ALL ".join(selects) + " ORDER BY 1")
    connection.execute("DELETE FROM temp.renamed")
    connection.execute("COMMIT")
    for source in range(len(group)):
        connection.execute(f"DETACH source{source}")


def is_whole(path: Path) -> bool:
    """Whether an index file is the one that its name promises."""
    return file_name(path) == path.name
