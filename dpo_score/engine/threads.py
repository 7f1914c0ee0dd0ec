"""Bounded hand-overs between threads, so that reading, computing and writing happen at once.

Promises: order is kept, at most `depth` items wait on either side (memory is bounded however slow the other
side is), and an exception on one side is raised on the other. Makes nothing faster by itself.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_END = object()


def prefetch(items: Iterable[T], depth: int = 1) -> Generator[T, None, None]:
    """Yield `items`, produced in a thread up to `depth` ahead of the consumer."""
    waiting: queue.Queue[object] = queue.Queue(maxsize=depth)
    abandoned = threading.Event()
    failure: list[BaseException] = []

    def produce() -> None:
        try:
            for item in items:
                if not _offer(waiting, item, abandoned):
                    return
        except BaseException as error:  # noqa: BLE001 - carried to the consumer, which raises it
            failure.append(error)
        _offer(waiting, _END, abandoned)

    thread = threading.Thread(target=produce, name="reader", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not _END:
            yield item  # type: ignore[misc]
        if failure:
            raise failure[0]
    finally:
        abandoned.set()
        thread.join()


def _offer(waiting: queue.Queue[object], item: object, abandoned: threading.Event) -> bool:
    while not abandoned.is_set():
        try:
            waiting.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def map_threads(function: Callable[[T], R], items: Iterable[T], width: int) -> Generator[R, None, None]:
    """`function` of each item, in order, up to `width` of them under way: for reading from where answers take time."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(max_workers=width, thread_name_prefix="at-once") as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) == width:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def background_writer(depth: int = 1) -> Iterator[Callable[[Callable[[], None]], None]]:
    """A function that runs tasks in order in one thread, at most `depth` waiting; the first failure is raised."""
    pending: list[Future[None]] = []

    def submit(task: Callable[[], None]) -> None:
        while len(pending) >= depth:
            pending.pop(0).result()
        pending.append(pool.submit(task))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as pool:
        try:
            yield submit
        finally:
            for future in pending:
                future.result()
