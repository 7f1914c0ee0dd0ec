"""Stand-ins for the storage primitives: they count, log, fail and stop calls, and show what a power cut may leave.

A power cut keeps what was fsynced. Of the rest, any write may be missing, short or zero-filled, and any change of
a folder (create, rename, unlink, mkdir) that was not followed by fsync_dir of it may be absent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dpo_score.storage import io as storage

LAST_CHANGES = 9
PRIMITIVES = ("create", "write", "fsync", "replace", "unlink", "make_dir", "fsync_dir")


class PowerCutError(BaseException):
    """The process ends here: nothing is cleaned up through the primitives any more."""


@dataclass
class Calls:
    """Every primitive call, in order; `before` may raise instead of letting a call through."""

    before: Callable[[int, str], None] = lambda number, name: None
    names: list[str] = field(default_factory=list)

    def __call__(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.names.append(name)
            self.before(len(self.names), name)
            return real(*args)

        return call


@contextmanager
def primitives(wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace all primitives for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name in PRIMITIVES:
            patch.setattr(storage, name, wrap(name, getattr(storage, name)))
        yield


def count(work: Callable[[], Any]) -> list[str]:
    """The primitive calls that `work` makes."""
    calls = Calls()
    with primitives(calls):
        work()
    return calls.names


@contextmanager
def failing(number: int, error: Callable[[], BaseException], afterwards: bool = False) -> Iterator[Calls]:
    """Raise at the `number`-th call; with `afterwards`, at every later one too (a disk that stays full)."""

    def before(n: int, name: str) -> None:
        if n == number or (afterwards and n > number):
            raise error()

    calls = Calls(before)
    with primitives(calls):
        yield calls


@contextmanager
def cut_at(number: int) -> Iterator[None]:
    """The process dies before its `number`-th call: no later call has any effect."""

    def before(n: int, name: str) -> None:
        if n >= number:
            raise PowerCutError

    with primitives(Calls(before)):
        yield


# ── what a power cut may leave ──────────────────────────────────────────────────────────────────────────────────


@dataclass
class Node:
    """A file's bytes: those on the device, and those written since its last fsync."""

    synced: bytes = b""
    pending: bytes = b""

    def variants(self) -> list[bytes]:
        if not self.pending:
            return [self.synced]
        whole = self.synced + self.pending
        return [self.synced, whole[: len(self.synced) + len(self.pending) // 2], self.synced + bytes(len(self.pending))]


Change = tuple[str, Path, Any]
"""("add", path, node) or ("drop", path, None) or ("dir", path, None), in the folder path.parent."""


@dataclass
class Disk:
    """A model of the device: names on it, and changes of folders not yet synced."""

    root: Path
    names: dict[Path, Node] = field(default_factory=dict)
    folders: set[Path] = field(default_factory=set)
    live: dict[Path, Node] = field(default_factory=dict)
    unsynced: list[list[Change]] = field(default_factory=list)
    handles: dict[int, Node] = field(default_factory=dict)

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = real(*args)
            self.note(name, args, result)
            return result

        return call

    def note(self, name: str, args: Sequence[Any], result: Any) -> None:
        """A call that has taken place."""
        getattr(self, f"_{name}")(*args, result)

    def _create(self, path: Path, fd: int) -> None:
        node = self.live[path] = self.handles[fd] = Node()
        self.unsynced.append([("add", path, node)])

    def _write(self, fd: int, data: bytes, _: None) -> None:
        self.handles[fd].pending += bytes(data)

    def _fsync(self, fd: int, _: None) -> None:
        node = self.handles[fd]
        node.synced, node.pending = node.synced + node.pending, b""

    def _replace(self, source: Path, target: Path, _: None) -> None:
        node = self.live[target] = self.live.pop(source)
        self.unsynced.append([("drop", source, None), ("add", target, node)])

    def _unlink(self, path: Path, _: None) -> None:
        self.live.pop(path, None)
        self.unsynced.append([("drop", path, None)])

    def _make_dir(self, path: Path, _: None) -> None:
        self.unsynced.append([("dir", path, None)])

    def _fsync_dir(self, folder: Path, _: None) -> None:
        """All entries of one folder become durable."""
        for change in self.unsynced:
            for step in [step for step in change if step[1].parent == folder]:
                self._apply(step, self.names, self.folders)
                change.remove(step)
        self.unsynced = [change for change in self.unsynced if change]

    @staticmethod
    def _apply(step: Change, names: dict[Path, Node], folders: set[Path]) -> None:
        kind, path, node = step
        if kind == "dir":
            folders.add(path)
        elif kind == "add":
            names[path] = node
        else:
            names.pop(path, None)

    def states(self) -> Iterator[dict[str, bytes]]:
        """The file systems a power cut now may leave, as name → bytes; files without their final name are left out."""
        relevant = [[step for step in change if ".tmp-" not in step[1].name] for change in self.unsynced]
        finished = {path: node for path, node in self.names.items() if ".tmp-" not in path.name}
        for chosen in _subsets([change for change in relevant if change]):
            names, folders = dict(finished), set(self.folders)
            for step in itertools.chain.from_iterable(chosen):
                self._apply(step, names, folders)
            reached = {
                path.relative_to(self.root).as_posix(): node
                for path, node in names.items()
                if self._reachable(path, folders)
            }
            contents = [node.variants() for node in reached.values()]
            for combination in itertools.product(*contents):
                yield dict(zip(reached, combination, strict=True))

    def _reachable(self, path: Path, folders: set[Path]) -> bool:
        below = [p for p in path.parents if p != self.root and p.is_relative_to(self.root)]
        return all(folder in folders for folder in below)


def _subsets(changes: list[list[Change]]) -> Iterator[tuple[list[Change], ...]]:
    """All choices of the last LAST_CHANGES changes that may have taken place, in their order."""
    early, late = changes[:-LAST_CHANGES], changes[-LAST_CHANGES:]
    for keep in itertools.product((True, False), repeat=len(late)):
        yield (*early, *itertools.compress(late, keep))


def lay_out(state: dict[str, bytes], root: Path) -> None:
    """Write a state as real files."""
    root.mkdir(parents=True, exist_ok=True)
    for name, data in state.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << (bit % 8))]))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
