"""First SIGINT or SIGTERM: stop between two packs, or two blocks that are looked at, or while a file is hashed.
Second: die at once.

Committed blocks stay committed either way; a block in progress leaves only temporaries, which the next run sweeps.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from dpo_score.errors import Interrupted

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Set by a signal handler, looked at by whoever is about to begin something that takes a while."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def check(self) -> bool:
        """False, or raises `Interrupted` with the signal that came."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)
        return False

    def between(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, with a look before each is handed on."""
        for item in items:
            self.check()
            yield item

    def __call__(self) -> bool:
        return self.signal_number is not None


@contextmanager
def signal_handlers() -> Iterator[StopRequest]:
    """Install the handlers for the length of a run (main thread only; elsewhere nothing is installed)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if request.signal_number is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        request.signal_number = number

    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
