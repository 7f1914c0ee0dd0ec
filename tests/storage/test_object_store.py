"""A store on an object store: memory:// here, the lease with a clock of our own."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from dpo_score.cli.main import main
from dpo_score.errors import ConfigError, DamageError, StorageError, UsageError
from dpo_score.storage import io as storage
from dpo_score.storage import locks
from dpo_score.storage import paths as names
from dpo_score.storage.cache.cache import open_cache
from dpo_score.storage.locks import Lease
from dpo_score.storage.object_store import RemoteStore
from dpo_score.storage.open import open_store
from tests.storage.cache.test_cache import FIELDS, agree, block, key
from tests.storage.test_powerloss import run
from tests.storage.test_resume import Action

TABLE = pa.table({"row_id": ["0:0", "0:1"], "logps": [-1.5, None]})
URL = "memory://bucket/out dir/é"


@pytest.fixture
def store() -> Iterator[RemoteStore]:
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]
    yield RemoteStore(URL)
    fsspec.filesystem("memory").store.clear()


def test_the_same_surface_as_a_local_store(store: RemoteStore, tmp_path: Path) -> None:
    local = open_store(tmp_path)
    for each in (store, local):
        record = each.write_table("scores/p/part.parquet", TABLE, {"a": "1"})
        assert each.write_json("m.json", {"a": 1}, if_absent=True)
        assert not each.write_json("m.json", {"a": 2}, if_absent=True)
        assert each.sha256(record.name) == record.sha256
        assert each.list() == ("m.json", "scores/p/part.parquet")
        assert each.list("scores") == ("scores/p/part.parquet",)
        stat = each.stat(record.name)
        assert stat is not None
        assert stat.size == record.size == len(each.read_bytes(record.name))
        assert each.stat("nothing") is None
        assert not each.exists("nothing")
        each.remove("nothing")
        assert each.read_table(record.name, ["logps"]).to_pydict() == {"logps": [-1.5, None]}
        kept = each.quarantine("m.json")
        assert each.list() == (record.name,)
        assert each.read_json(kept) == {"a": 1}
    assert store.read_bytes(record.name) == local.read_bytes(record.name)


def test_urls_name_the_object(store: RemoteStore) -> None:
    assert store.url("a/b.json").removeprefix("memory://").lstrip("/") == "bucket/out dir/é/a/b.json"
    assert isinstance(open_store(URL), RemoteStore)


@pytest.mark.parametrize("name", ["/a", "../a", "a//b", "a/.."])
def test_names_that_leave_the_store_are_refused(store: RemoteStore, name: str) -> None:
    for use in (store.read_bytes, store.remove, store.exists, store.stat, store.sha256):
        with pytest.raises(UsageError, match="not a name inside"):
            use(name)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("foo://bucket/x", r"no file system is known for foo://; known: .*\bgs, .*\bs3\b"),
        ("absent://bucket/x", r"a package that absent:// needs is not installed: Install no-such-package"),
        ("simplecache://bucket/x", "cannot be written to"),
    ],
)
def test_a_scheme_that_nothing_here_knows_is_refused_with_what_is_missing(
    url: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.register_implementation("absent", "no_such_package.Fs", clobber=True, errtxt="Install no-such-package")
    with pytest.raises(ConfigError, match=said):
        open_store(url)
    for command in (["status", url], ["verify", url], ["cache", "ls", f"--cache-dir={url}"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert (stop.value.code, url in capsys.readouterr().err) == (2, True)


def test_missing_and_damaged_objects(store: RemoteStore) -> None:
    for read in (store.read_bytes, store.read_json, store.read_table, store.sha256, store.open_table):
        with pytest.raises(StorageError, match=r"nothing: it is not there"):
            read("nothing")
    store.write_bytes("a.parquet", b"PAR1 torn")
    with pytest.raises(DamageError, match=r"a\.parquet"):
        store.read_table("a.parquet")


def test_a_failed_put_leaves_no_object_and_no_spool(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(storage, "put", refuse)
    with pytest.raises(StorageError, match=r"memory://.*EACCES"):
        store.write_table("a.parquet", TABLE, {})
    assert store.list() == ()
    assert store._spool.list() == ()


def test_what_a_client_library_raises_is_a_storage_error(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")

    def refuse(*_: Any) -> None:
        raise exceptions.NoCredentialsError

    monkeypatch.setattr(storage, "put", refuse)
    with pytest.raises(StorageError, match=r"memory://.*credentials"):
        store.write_bytes("a", b"")


def test_a_killed_run_resumes_to_the_same_objects(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each of its requests in turn, then run again."""
    golden = RemoteStore("memory://bucket/golden")
    run(golden)
    real, stop_at, calls = storage.put, [0], [0]

    def counted(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == stop_at[0]:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(storage, "put", counted)
    for number in range(1, 9):
        store = RemoteStore(f"memory://bucket/out{number}")
        calls[0], stop_at[0] = 0, number
        with pytest.raises(KeyboardInterrupt):
            run(store)
        assert set(run(store)) <= {Action.SKIP, Action.REDO}
        assert store.list() == golden.list()
        assert all(store.read_bytes(name) == golden.read_bytes(name) for name in store.list())


def test_the_cache_works_there_too(store: RemoteStore) -> None:
    said: list[str] = []
    space = open_cache(f"{URL}/cache", said.append).namespace(FIELDS)
    for n in range(40):
        space.add(f"b{n}", block(10 * n, 10 * n + 10))
    keys = [key(n) for n in range(0, 420, 3)]
    found = space.view(space.snapshot()).lookup(keys)
    assert agree(found, {k: e for k, e in block(0, 400).items() if k in keys})
    assert said == []


# the lease


class Clock:
    """Seconds that pass when we say so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1e9
        monkeypatch.setattr(locks.time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def elsewhere(monkeypatch: pytest.MonkeyPatch, host: str = "another") -> None:
    """From here on this process is seen as one of another host."""
    machine = names.machine() if host == locks.owner()["host"] else host
    who = {"pid": 7, "host": host, "machine": machine, "start": "2026-01-01"}
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(locks, "owner", lambda: dict(who))


def test_a_second_run_is_told_who_holds_the_lease(store: RemoteStore, clock: Clock) -> None:
    with store.lock(), pytest.raises(UsageError, match=rf"pid {os.getpid()} on host"), RemoteStore(URL).lock():
        pass
    with RemoteStore(URL).lock():
        pass
    assert store.list(".work") == ()


def test_a_lease_is_taken_over_after_five_minutes_without_renewal(
    store: RemoteStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = locks.acquire(store)
    elsewhere(monkeypatch)
    clock.now += locks.TAKEOVER_SECONDS - 1
    with pytest.raises(UsageError, match="in use"):
        locks.acquire(RemoteStore(URL))
    clock.now += 1
    assert locks.acquire(RemoteStore(URL)).generation == dead.generation + 1


def test_a_renewed_lease_is_not_taken_over(store: RemoteStore, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    held = locks.acquire(store)
    for _ in range(20):
        clock.now += locks.RENEW_SECONDS
        held.renew()
    elsewhere(monkeypatch)
    clock.now += locks.TAKEOVER_SECONDS - 1
    with pytest.raises(UsageError, match="in use"):
        locks.acquire(RemoteStore(URL))


def test_a_paused_holder_stops_writing_once_another_took_over(
    store: RemoteStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused = locks.acquire(store)
    elsewhere(monkeypatch)
    clock.now += locks.TAKEOVER_SECONDS
    new = locks.acquire(RemoteStore(URL))
    with pytest.raises(StorageError, match="lost its lease"):
        paused.check()
    paused.lost = None
    paused.renew()
    with pytest.raises(StorageError, match="another run took over"):
        paused.check()
    new.check()
    assert store.list(".work") == (new.name,)


def test_every_write_checks_the_lease(store: RemoteStore, clock: Clock) -> None:
    with suppress(StorageError), store.lock():
        store.write_bytes("before", b"")
        clock.now += locks.TAKEOVER_SECONDS + 1
        for write in (
            lambda: store.write_bytes("a", b""),
            lambda: store.write_table("b", TABLE, {}),
            lambda: store.remove("before"),
            lambda: store.write_json("c", {}, if_absent=True),
        ):
            with pytest.raises(StorageError, match="could not be renewed for 240 s"):
                write()
    assert store.list() == ("before",)


def test_a_dead_holder_of_this_host_is_replaced_at_once(
    store: RemoteStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = locks.owner()["host"]
    monkeypatch.setattr(locks.names, "alive", lambda pid: False)
    elsewhere(monkeypatch, here)
    first = locks.acquire(store)
    monkeypatch.undo()
    monkeypatch.setattr(locks.time, "time", lambda: clock.now)
    monkeypatch.setattr(locks.names, "alive", lambda pid: pid != 7)
    assert locks.acquire(RemoteStore(URL)).generation == first.generation + 1


def test_a_lease_of_an_earlier_process_with_this_pid_is_replaced_at_once(store: RemoteStore, clock: Clock) -> None:
    first = locks.acquire(store)  # never entered the tokens of this life
    assert locks.acquire(RemoteStore(URL)).generation == first.generation + 1


def test_an_unreadable_lease_is_no_lease(store: RemoteStore, clock: Clock) -> None:
    for data in (b"", b"[]", b"{}"):
        store.write_bytes(".work/lease-000003.json", data)
        assert locks.acquire(store).generation == 4
        store.remove(".work/lease-000004.json")


def test_a_repeated_request_that_meets_its_own_object_won(
    store: RemoteStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client library sent a conditional PUT twice: the first arrived, its answer did not."""
    real = RemoteStore.write_bytes

    def twice(self: RemoteStore, name: str, data: bytes, if_absent: bool = False) -> bool:
        real(self, name, data, if_absent)
        return real(self, name, data, if_absent)

    monkeypatch.setattr(RemoteStore, "write_bytes", twice)
    assert locks.acquire(store).generation == 1


def test_an_older_generation_created_late_gives_way(
    store: RemoteStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked before either wrote; the other one has gone further since."""
    current = store.write_json(".work/lease-000002.json", {"pid": 1, "host": "x", "renewed": clock.now})
    assert current
    looks = iter([0])
    real = locks.newest
    monkeypatch.setattr(locks, "newest", lambda s, _kind: next(looks, None) or (real(s) if looks_done(looks) else 0))
    with pytest.raises(UsageError, match="in use"):
        locks.acquire(store)
    assert store.list(".work") == (".work/lease-000002.json",)


def looks_done(looks: Iterator[int]) -> bool:
    return next(looks, "done") == "done"


def test_the_keeper_renews_in_the_background_and_survives_a_failed_request(
    store: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewals: list[int] = []
    done = threading.Event()

    def renew(self: Lease) -> None:
        renewals.append(1)
        if len(renewals) == 1:
            raise StorageError("the network is away")
        done.set()

    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(Lease, "renew", renew)
    with store.lock():
        assert done.wait(30)
    assert len(renewals) >= 2
