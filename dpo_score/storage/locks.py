"""One writer at a time: an operating system's lock on a local disk, a lease on an object store.

On a local disk the kernel frees the lock when its holder dies. It is never a lock that consists of a file's existence;
who holds it is written beside it for the message only.

On an object store:

    .work/lease-000007.json   generation 7, {pid, host, start, token, renewed}

A generation is created by conditional PUT, so one process wins it. Its holder renews it every 30 s; a process that
finds it unrenewed for 5 minutes, or its holder dead on this very machine, creates the next generation. A holder that
was paused stops writing after 4 minutes without renewal, or when it finds a higher generation. Clocks must agree
within a minute; a store without conditional PUT protects only against runs that do not start at one instant.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpo_score.errors import DamageError, DpoScoreError, StorageError, UsageError
from dpo_score.storage import paths as names
from dpo_score.storage.base import Store
from dpo_score.storage.faults import translated

MOMENT_SECONDS = 60.0
SHARE_SECONDS = 10.0
"""How long a share waits for others that begin at the same instant; a whole run holds on for longer."""


def owner() -> dict[str, Any]:
    """This process, for the message another one will print, and where its process number holds (`paths.machine`)."""
    start = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "machine": names.machine(), "start": start}


def busy(where: str | Path, found: Mapping[str, Any]) -> UsageError:
    who = f"pid {found.get('pid', '?')} on host {found.get('host', '?')}, started {found.get('start', '?')}"
    return UsageError(
        f"{where} is in use by another run ({who}). Wait for it, stop it, or choose another output folder"
    )


@contextmanager
def exclusive(path: Path, refused: Callable[[], DpoScoreError], seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, or raise what `refused` returns after `seconds` (-1: wait for ever)."""
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    with translated(path):
        try:
            lock.acquire(timeout=seconds)
        except Timeout:  # an OSError too, hence inside
            raise refused() from None
    try:
        yield
    finally:
        lock.release()


def moment(path: Path) -> AbstractContextManager[None]:
    """Hold `path` for an instant, waiting for others that do the same; StorageError where one never lets go."""
    stuck = StorageError(
        f"{path}: another process has held this lock for {MOMENT_SECONDS:.0f} s, which takes milliseconds; it "
        "may be suspended. Stop it: the kernel frees the lock, and the same command resumes"
    )
    return exclusive(path, lambda: stuck, MOMENT_SECONDS)


RENEW_SECONDS = 30.0
TAKEOVER_SECONDS = 300.0
WATCH_SECONDS = 40.0
"""How long a lease of another machine that seems to have run out is watched before it is taken over."""
HELD_SECONDS = 240.0
WHOLE = "lease"
"""The lease of a whole run; others are of one share of a run, or of a turn among shares."""
POLL_SECONDS = 0.5
LEASE_SHARE_SECONDS = 60.0
"""How long a share waits for others that begin at the same instant."""
_LEASE = re.compile(rf"{re.escape(names.WORK)}/(?P<kind>lease|turn|share-[\w-]+?)-(?P<generation>\d{{6,}})\.json")
_tokens: set[str] = set()
"""Leases that this process holds: another with its pid is of an earlier life."""


@dataclass(slots=True)
class Lease:
    """A generation of this process, last renewed at `renewed`. `lost`: why it no longer holds; None while it does."""

    store: Store
    generation: int
    holder: dict[str, Any]
    renewed: float
    lost: str | None = None
    kind: str = WHOLE

    @property
    def name(self) -> str:
        return _name(self.kind, self.generation)

    def check(self) -> None:
        """StorageError when another run has taken over, or when renewals have failed for too long."""
        if self.lost is None and time.time() - self.renewed > HELD_SECONDS:
            self.lost = f"it could not be renewed for {HELD_SECONDS:.0f} s"
        if self.lost is not None:
            raise StorageError(
                f"{self.store.url()}: this run lost its lease ({self.lost}), so it stops writing; committed blocks "
                "are kept and the same command resumes"
            )

    def renew(self) -> None:
        if newest(self.store, self.kind) > self.generation:
            self.lost = "another run took over"
            return
        now = time.time()
        self.store.write_json(self.name, self.holder | {"renewed": now})
        self.renewed = now


def _name(kind: str, generation: int) -> str:
    return f"{names.WORK}/{kind}-{generation:06d}.json"


def newest(store: Store, kind: str = WHOLE) -> int:
    """The highest generation there is, 0 for none."""
    return _generations(store).get(kind, 0)


def _generations(store: Store) -> dict[str, int]:
    """The highest generation of every kind of lease."""
    found: dict[str, int] = {}
    for match in map(_LEASE.fullmatch, store.list(names.WORK)):
        if match is not None:
            found[match["kind"]] = max(found.get(match["kind"], 0), int(match["generation"]))
    return found


def refuse_shares(store: Store) -> None:
    """The UsageError that names the living holder of a share, if there is one."""
    for kind, generation in _generations(store).items():
        found = _in_force(store, _name(kind, generation)) if kind.startswith("share-") else None
        if found is not None:
            raise busy(store.url(), found)


def acquire(store: Store, kind: str = WHOLE) -> Lease:
    """The next generation, or the UsageError that names its living holder."""
    last = newest(store, kind)
    if last:
        found = _in_force(store, _name(kind, last))
        if found is not None:
            raise busy(store.url(), found)
    lease = Lease(store, last + 1, owner() | {"token": secrets.token_hex(8)}, time.time(), kind=kind)
    won = store.write_json(lease.name, lease.holder | {"renewed": lease.renewed}, if_absent=True)
    if not won and _read(store, lease.name).get("token") != lease.holder["token"]:  # a request sent twice finds its own
        raise busy(store.url(), _read(store, lease.name))
    if newest(store, kind) > lease.generation:
        store.remove(lease.name)
        raise busy(store.url(), _read(store, _name(kind, newest(store, kind))))
    if last:
        store.remove(_name(kind, last))
    return lease


def _holds(found: Mapping[str, Any], now: float) -> bool:
    """Whether a lease is in force: renewed of late, and its process not known to be dead."""
    renewed, pid = (  # another process wrote them: 0 where it wrote no number
        value if isinstance(value := found.get(name), int | float) else 0 for name in ("renewed", "pid")
    )
    if abs(now - renewed) >= TAKEOVER_SECONDS:  # a clock set back must not hold for ever
        return False
    if found.get("machine") != owner()["machine"]:
        return True
    return found.get("token") in _tokens if int(pid) == os.getpid() else names.alive(int(pid))


def _in_force(store: Store, name: str) -> dict[str, Any] | None:
    """What a lease says of its holder, None when it may be taken over.

    The clocks of two machines may differ, so one that seems to have run out is watched for longer than a holder waits
    between two renewals: a live one is renewed meanwhile.
    """
    found = _read(store, name)
    if _holds(found, time.time()):
        return found
    if not found or found.get("machine") == owner()["machine"]:
        return None
    until = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < until:
        time.sleep(min(POLL_SECONDS, WATCH_SECONDS))
        again = _read(store, name)
        if again and again.get("renewed") != found.get("renewed"):
            return again
    return None


@contextmanager
def hold(store: Store, kind: str = WHOLE, seconds: float = 0.0) -> Iterator[Callable[[], None]]:
    """Hold a lease, asked for during `seconds` and renewed by a thread; yields the check that every write makes."""
    until = time.monotonic() + seconds
    while True:
        try:
            lease = acquire(store, kind)
            break
        except UsageError:
            if time.monotonic() > until:
                raise
        time.sleep(POLL_SECONDS)
    stop = threading.Event()

    def keep() -> None:
        while lease.lost is None and not stop.wait(RENEW_SECONDS):
            with suppress(StorageError):  # tried again in RENEW_SECONDS; `check` gives up after HELD_SECONDS
                lease.renew()

    _tokens.add(lease.holder["token"])
    keeper = threading.Thread(target=keep, name="dpo-score-lease", daemon=True)
    keeper.start()
    try:
        yield lease.check
    finally:
        stop.set()
        keeper.join()
        _tokens.discard(lease.holder["token"])
        if lease.lost is None:
            store.remove(lease.name)


def _read(store: Store, name: str) -> dict[str, Any]:
    try:
        found = store.read_json(name)
    except (StorageError, DamageError):
        return {}
    return found if isinstance(found, dict) else {}
