"""One writer at a time on a local disk: an OS lock, which the kernel frees when its holder dies.

Never a lock that consists of a file's existence. Who holds it is written beside it for the message only.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpo_score.errors import StorageError, UsageError
from dpo_score.storage.faults import translated

MOMENT_SECONDS = 60.0
SHARE_SECONDS = 10.0
"""How long a share waits for others that begin at the same instant; a whole run holds on for longer."""


def owner() -> dict[str, Any]:
    """This process, for the message another one will print."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "start": datetime.now(UTC).isoformat(timespec="seconds")}


def busy(where: str | Path, found: Mapping[str, Any]) -> UsageError:
    who = f"pid {found.get('pid', '?')} on host {found.get('host', '?')}, started {found.get('start', '?')}"
    return UsageError(
        f"{where} is in use by another run ({who}). Wait for it, stop it, or choose another output folder"
    )


@contextmanager
def exclusive(path: Path, found: Callable[[], Mapping[str, Any]], seconds: float = 0.0) -> Iterator[None]:
    """Hold `path` or raise, after `seconds` (-1: never), the UsageError that names what `found` returns."""
    held = FileLock(path, thread_local=False, fallback_to_soft=False)
    with translated(path):
        try:
            held.acquire(timeout=seconds)
        except Timeout:  # an OSError too, hence inside
            raise busy(path.parent.parent, found()) from None
    try:
        yield
    finally:
        held.release()


@contextmanager
def moment(path: Path) -> Iterator[None]:
    """Hold `path` for an instant, waiting for others that do the same; StorageError where one never lets go."""
    held = FileLock(path, thread_local=False, fallback_to_soft=False)
    with translated(path):
        try:
            held.acquire(timeout=MOMENT_SECONDS)
        except Timeout:
            raise StorageError(
                f"{path}: another process has held this lock for {MOMENT_SECONDS:.0f} s, which takes milliseconds; it "
                "may be suspended. Stop it: the kernel frees the lock, and the same command resumes"
            ) from None
    try:
        yield
    finally:
        held.release()
