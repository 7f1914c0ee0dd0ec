"""Read the next checkpoint's files into the page cache while the current one computes. No torch.

Promises: one background thread, one file at a time, constant memory; `stop` ends it within one chunk.
Does not: parse, keep or check anything. A file that cannot be read is left to the loader, which reports it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

CHUNK = 8 * 2**20


class Prefetch:
    """A running read-ahead over `paths`, in order."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(tuple(paths),), name="prefetch-weights", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def wait(self) -> None:
        """Until everything is read."""
        self._thread.join()

    def _read(self, paths: tuple[Path, ...]) -> None:
        buffer = memoryview(bytearray(CHUNK))
        for path in paths:
            try:
                with path.open("rb", buffering=0) as file:
                    while not self._stop.is_set() and file.readinto(buffer):
                        pass
            except OSError:
                return
