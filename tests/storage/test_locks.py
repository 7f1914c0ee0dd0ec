"""A lock or lease of a dead process or host never holds for ever: not of a run, not of a share, not of a turn."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from dpo_score.errors import StorageError, UsageError
from dpo_score.storage import locks, paths
from dpo_score.storage.base import Store
from dpo_score.storage.open import open_store


def _hold(root: str, ready: object) -> None:
    store = open_store(root)
    with store.share("0-of-2"), store.turn(), locks.exclusive(Path(root) / ".work/lock", dict):
        ready.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_every_lock_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    context, root = multiprocessing.get_context("spawn"), str(tmp_path / "out")
    ready = context.Event()
    child = context.Process(target=_hold, args=(root, ready))
    child.start()
    assert ready.wait(60)
    child.kill()
    child.join()
    store = open_store(root)
    with store.lock():
        pass
    with store.share("0-of-2"), store.turn():
        pass


def test_a_moment_that_never_ends_is_an_error_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "MOMENT_SECONDS", 0.05)
    path = tmp_path / "create.lock"
    with (
        locks.moment(path),
        pytest.raises(StorageError, match=r"create\.lock: another process has held .* the same command resumes"),
        locks.moment(path),
    ):
        pass
    with locks.moment(path):
        pass


# leases


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(locks, "LEASE_SHARE_SECONDS", 0.0)
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.0)
    fsspec.filesystem("memory").store.clear()
    yield open_store("memory://leases/out")
    fsspec.filesystem("memory").store.clear()


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def leave(store: Store, kind: str, host: str, renewed: float, pid: int = 1) -> None:
    """A lease as a process of `host` left it; of this machine where that is this host's name."""
    machine = paths.machine() if host == locks.owner()["host"] else host
    fields = {"pid": pid, "host": host, "machine": machine, "start": "then", "renewed": renewed}
    store.write_json(f".work/{kind}-000003.json", fields)


def take_all(store: Store) -> None:
    """A whole run, then a share and its turn."""
    with store.lock():
        pass
    with store.share("0-of-2"), store.turn():
        store.write_json("a.json", 1)


@pytest.mark.parametrize("kind", ["lease", "share-0-of-2", "turn"])
@pytest.mark.parametrize("age", [locks.TAKEOVER_SECONDS + 1, 30 * 86_400.0, -2 * locks.TAKEOVER_SECONDS])
def test_a_lease_of_a_host_that_is_silent_ends(store: Store, kind: str, age: float) -> None:
    leave(store, kind, "a host that is gone", time.time() - age)
    take_all(store)


@pytest.mark.parametrize("kind", ["lease", "share-0-of-2", "turn"])
def test_a_lease_of_a_dead_process_of_this_host_ends_at_once(store: Store, kind: str) -> None:
    leave(store, kind, str(locks.owner()["host"]), time.time(), dead_pid())
    take_all(store)


def test_a_dead_process_of_this_host_is_not_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WATCH_SECONDS", 40.0)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: pytest.fail("it waits for a process that is dead"))
    leave(store, "lease", str(locks.owner()["host"]), time.time(), dead_pid())
    take_all(store)


def test_a_host_that_stays_silent_while_it_is_watched_loses_its_lease(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.01)
    leave(store, "lease", "another host", time.time() - 3 * locks.TAKEOVER_SECONDS)
    take_all(store)


def test_a_lease_of_a_live_process_of_this_host_holds_and_one_of_an_earlier_life_of_ours_does_not(store: Store) -> None:
    here = str(locks.owner()["host"])
    leave(store, "lease", here, time.time(), os.getppid())
    with pytest.raises(UsageError, match=f"pid {os.getppid()} on host {re.escape(here)}, started then"):
        take_all(store)
    leave(store, "lease", here, time.time(), os.getpid())  # its token is none that this process holds
    take_all(store)


def test_of_two_that_begin_at_one_instant_the_second_to_write_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither had seen the other's lease: it is written only where there is none."""
    fields = {"pid": os.getppid(), "host": "first", "machine": "first", "start": "then", "renewed": time.time()}
    store.write_json(".work/lease-000001.json", {**fields, "token": "of the first"})
    monkeypatch.setattr(locks, "newest", lambda *asked: 0)
    with pytest.raises(UsageError, match="on host first, started then"):
        locks.acquire(store)
    assert store.read_json(".work/lease-000001.json")["token"] == "of the first"


def test_a_newer_lease_that_appears_meanwhile_wins(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"pid": os.getppid(), "host": "newer", "machine": "newer", "start": "then", "renewed": time.time()}
    store.write_json(".work/lease-000005.json", fields)
    store.write_json(".work/turn-000009.json", fields)  # of another kind: no matter
    seen = locks.newest
    answers = [0]
    monkeypatch.setattr(locks, "newest", lambda *asked: answers.pop() if answers else seen(*asked))
    with pytest.raises(UsageError, match="on host newer, started then"):
        locks.acquire(store)
    assert not store.exists(".work/lease-000001.json")
    assert store.exists(".work/lease-000005.json")


@pytest.mark.parametrize("kind", ["lease", "share-0-of-2"])
def test_a_lease_that_is_renewed_holds(store: Store, kind: str) -> None:
    leave(store, kind, "another host", time.time() - 1)
    with pytest.raises(UsageError, match="in use by another run"):
        take_all(store)


def test_a_live_lease_is_not_taken_by_a_machine_whose_clock_is_ahead(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WATCH_SECONDS", 5.0)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.01)
    leave(store, "lease", "another host", time.time() - 3 * locks.TAKEOVER_SECONDS)
    asleep = time.sleep

    def renewed_meanwhile(seconds: float) -> None:
        leave(store, "lease", "another host", time.time() - 3 * locks.TAKEOVER_SECONDS + 30)
        asleep(seconds)

    monkeypatch.setattr(locks.time, "sleep", renewed_meanwhile)
    with pytest.raises(UsageError, match="in use by another run"):
        locks.acquire(store)


@pytest.mark.parametrize("renewed", ["yesterday", None, [], True])
def test_a_lease_that_says_nonsense_is_taken_over(store: Store, renewed: object) -> None:
    fields = {"pid": "x", "host": 3, "machine": "elsewhere", "renewed": renewed}
    store.write_json(".work/lease-000003.json", fields)
    take_all(store)


# two containers with one host's name: process numbers of one mean nothing in the other

IN_A_NAMESPACE = """
import os, sys
from dpo_score.errors import UsageError
from dpo_score.storage import locks, paths
from dpo_score.storage.local import LocalStore
from dpo_score.storage.open import open_store
folder, machine = sys.argv[1], sys.argv[2]
assert paths.machine() != machine, "a PID namespace of its own is another machine"
print(open_store(folder).sweep())
lease = {"pid": int(sys.argv[3]), "host": os.uname().nodename, "machine": machine, "renewed": __import__("time").time()}
assert locks._holds(lease, lease["renewed"]), "a live lease of another namespace holds"
"""


def test_another_pid_namespace_leaves_a_live_writer_its_file_and_its_lease(tmp_path: Path) -> None:
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine allows no new PID namespace")
    writer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        name = paths.temp_name("part.parquet").replace(f".tmp-{os.getpid()}-", f".tmp-{writer.pid}-")
        file = tmp_path / name
        file.parent.mkdir()
        file.write_bytes(b"half written")
        command = [*unshare, sys.executable, "-c", IN_A_NAMESPACE, str(tmp_path), paths.machine(), str(writer.pid)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (found.returncode, found.stdout) == (0, "()\n"), found.stderr
        assert file.exists()
        assert open_store(tmp_path).sweep() == (), "its process lives"
    finally:
        writer.kill()
        writer.wait()
    assert open_store(tmp_path).sweep() == (name,)
