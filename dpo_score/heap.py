"""What becomes of host memory that was freed: kept for the next use while passes run, given back between large steps.

The layers of a model allocate and free the same large blocks thousands of times, and glibc hands such blocks back to
the system, which clears every page again when it is next touched (170,000 pages for a pack of a 135M model, a quarter
of the time in 16 bits). The peak is the same. Where tables of a million rows are read one after the other it is the
other way round: what Arrow and glibc keep of each adds up. Without glibc nothing changes.

Python's garbage collector looks for reference cycles whenever 700 more objects are alive. Rows of a data set are many
small objects without cycles, beside a million of torch and transformers that stay: a higher threshold saves 15 % of the
time that reading rows takes.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_THRESHOLD: 2**30}
USUAL = {M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25}
"""What glibc's own adjustment arrives at in a process that has freed large blocks; it ends once a threshold is set."""


@contextmanager
def host_memory_kept() -> Iterator[None]:
    """Nothing is given back to the system inside the block."""
    libc = glibc()
    if libc is None:
        yield
        return
    _set(libc, KEEP)
    try:
        yield
    finally:
        _set(libc, USUAL)


@cache
def glibc() -> Any:
    """The C library where it is glibc, else None."""
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - there only in glibc
    except (OSError, AttributeError, TypeError):
        return None
    return libc


def _set(libc: Any, thresholds: dict[int, int]) -> None:
    for name, value in thresholds.items():
        libc.mallopt(name, value)


def return_memory() -> None:
    """Give the system back what was freed: about 150 MB after the parts of a million rows."""
    from pyarrow import default_memory_pool  # the command line imports this module to show its help

    default_memory_pool().release_unused()
    if (libc := glibc()) is not None:
        libc.malloc_trim(0)


def collect_garbage_rarely() -> None:
    """Let this process collect reference cycles after 50,000 new objects instead of 700; not for a caller's process."""
    gc.set_threshold(50_000, 20, 20)
