"""A limit on how long somebody else's program may keep this thread.

Promises: Python code (a chat template is compiled to it) that runs longer than allowed ends in `OverdueError`, in
any thread, at its next instruction. Does not interrupt a single call of native code, and does not limit memory.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dpo_score.errors import ModelError

TEMPLATE_SECONDS = 60.0
"""An honest template needs a thousandth of a second a conversation; a row is never rejected for a slow machine."""
TICK_SECONDS = 0.2


class OverdueError(ModelError):
    """The run stops: a row that were rejected by the clock would make results depend on the machine."""

    def __init__(self) -> None:
        super().__init__(
            f"the chat template ran for more than {TEMPLATE_SECONDS:g} s on one conversation: it does not end, or is "
            "not meant to. Look at it, or name another one with --chat-template"
        )


@dataclass
class _Watch:
    """Who must be done by when; one daemon thread looks, started at the first use of each process."""

    due: dict[int, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.Thread | None = None

    def look(self) -> None:
        while True:
            time.sleep(TICK_SECONDS)
            now = time.monotonic()
            with self.lock:
                for ident in [ident for ident, moment in self.due.items() if moment < now]:
                    del self.due[ident]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(OverdueError))

    def start(self) -> None:
        if self.thread is None or not self.thread.is_alive():  # a fork leaves the thread behind
            self.thread = threading.Thread(target=self.look, name="template deadline", daemon=True)
            self.thread.start()


_watch = _Watch()


@contextmanager
def template_deadline() -> Iterator[None]:
    """What runs inside ends after TEMPLATE_SECONDS at the latest, with OverdueError."""
    ident = threading.get_ident()
    with _watch.lock:
        _watch.due[ident] = time.monotonic() + TEMPLATE_SECONDS
        _watch.start()
    try:
        yield
    finally:
        with _watch.lock:
            _watch.due.pop(ident, None)
