"""A store on a local disk: names, atomic writes, faults at every call, sweeping, one writer."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_score.cli.main import main
from dpo_score.errors import DamageError, StorageError, UsageError
from dpo_score.storage import io as storage
from dpo_score.storage import paths as names
from dpo_score.storage.local import LocalStore
from dpo_score.storage.open import open_store
from tests.storage import shim

TABLE = pa.table({"row_id": ["0:0", "0:1", "0:2"], "logps": [-1.5, -2.5, None], "tokens": [[1.0], [], None]})
FAULTS = [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "out")


# names


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../x", "a//b", "./a", "a/.", "a\\b", "a\0b"])
def test_a_name_that_leaves_the_store_is_refused(store: LocalStore, name: str) -> None:
    for use in (store.read_bytes, store.remove, store.exists, store.stat, store.sha256, store.quarantine):
        with pytest.raises(UsageError, match="not a name inside"):
            use(name)
    with pytest.raises(UsageError, match="not a name inside"):
        store.write_bytes(name, b"")


def test_a_symbolic_link_below_the_root_may_not_lead_outside(store: LocalStore, tmp_path: Path) -> None:
    store.write_bytes("a.txt", b"in")
    (tmp_path / "elsewhere").mkdir()
    (store.root / "scores").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="leads outside"):
        store.write_bytes("scores/x", b"")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_root_itself_may_be_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    LocalStore(tmp_path / "out").write_bytes("a/b.txt", b"x")
    assert (tmp_path / "disk" / "a" / "b.txt").read_bytes() == b"x"


def test_an_unfinished_file_is_never_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        storage.create(tmp_path / "link")
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("folder", ["with space", "ünïcødé-文", "x" * 255])
def test_folders_of_any_name(tmp_path: Path, folder: str) -> None:
    store = LocalStore(tmp_path / folder)
    assert store.write_table("scores/p/part.parquet", TABLE, {}).rows == 3
    assert store.list() == ("scores/p/part.parquet",)


def test_a_strict_umask_is_kept(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        LocalStore(tmp_path / "out").write_bytes("a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "a").stat().st_mode & 0o077 == 0


# writing and reading


def test_a_table_is_read_back_with_its_metadata_and_its_record(store: LocalStore) -> None:
    record = store.write_table("scores/p/part.parquet", TABLE, {"b": "2", "a": "1"})
    data = (store.root / record.name).read_bytes()
    assert (record.size, record.rows, record.sha256) == (len(data), 3, hashlib.sha256(data).hexdigest())
    found = store.read_table(record.name)
    assert found.equals(TABLE.replace_schema_metadata(None)) or found.to_pylist() == TABLE.to_pylist()
    assert found.schema.metadata == {b"a": b"1", b"b": b"2"}
    assert store.read_table(record.name, ["logps"]).column_names == ["logps"]


def test_the_same_table_gives_the_same_bytes(store: LocalStore) -> None:
    split = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)])
    first = store.write_table("a.parquet", TABLE, {"x": "1", "y": "2"})
    second = store.write_table("b.parquet", split.combine_chunks(), {"y": "2", "x": "1"})
    assert first.sha256 == second.sha256


NESTED = pa.struct([("codes", pa.list_(pa.int32())), ("deep", pa.large_list(pa.list_(pa.string())))])
ROWS = [{"codes": [1, None], "deep": [["a"], None, []]}, None, {"codes": None, "deep": []}]


def test_a_table_that_was_read_is_written_as_it_was_the_first_time(store: LocalStore) -> None:
    fresh = pa.table({"x": [[1], [], None], "y": pa.array(ROWS, NESTED), "marks": pa.array([["a"], [], None])})
    first = store.write_table("a.parquet", fresh, {"k": "v"})
    second = store.write_table("b.parquet", store.read_table("a.parquet"), {"k": "v"})
    sliced = pa.concat_tables([store.read_table("a.parquet"), fresh.cast(store.read_table("a.parquet").schema)])
    third = store.write_table("c.parquet", sliced.slice(3), {"k": "v"})
    assert first.sha256 == second.sha256 == third.sha256
    assert store.read_table("b.parquet").to_pylist() == fresh.to_pylist()


def test_parts_become_row_groups_of_one_file(store: LocalStore) -> None:
    record = store.write_tables("a.parquet", TABLE.schema, [TABLE, TABLE.slice(0, 1)], {}, 2)
    with store.open_table("a.parquet") as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    assert (record.rows, groups) == (4, [2, 1, 1])


def test_json_is_sorted_strict_and_ends_in_a_newline(store: LocalStore) -> None:
    store.write_json("a.json", {"b": [1, 2.5, None], "a": "\x1b\u202e文\ud800"})
    text = store.read_bytes("a.json")
    assert text.endswith(b"}\n")
    assert text.isascii()
    assert text.index(b'"a"') < text.index(b'"b"')
    assert store.read_json("a.json") == {"a": "\x1b\u202e文\ud800", "b": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json("a.json", {"x": float("nan")})
    assert store.read_json("a.json")["b"] == [1, 2.5, None]


def test_create_if_absent_has_one_winner(store: LocalStore) -> None:
    assert store.write_json("m.json", {"run": 1}, if_absent=True)
    assert not store.write_json("m.json", {"run": 2}, if_absent=True)
    assert store.read_json("m.json") == {"run": 1}


def test_listing_hides_the_workshop(store: LocalStore) -> None:
    for name in ("b/2", "b/1", "a", ".work/x"):
        store.write_bytes(name, b"")
    assert store.list() == ("a", "b/1", "b/2")
    assert store.list("b") == ("b/1", "b/2")
    assert store.list(".work") == (".work/x",)
    assert store.list("nowhere") == ()


def test_a_missing_file(store: LocalStore) -> None:
    assert store.stat("a") is None
    assert not store.exists("a")
    store.remove("a")
    for read in (store.read_bytes, store.read_json, store.read_table, store.sha256, store.open_table):
        with pytest.raises(StorageError, match=r"a: it is not there \(ENOENT\)"):
            read("a")


@contextmanager
def closed(folder: Path) -> Iterator[None]:
    """Nobody may look into `folder`; this process is nobody in particular."""
    user = os.geteuid()
    folder.chmod(0)
    try:
        if user == 0:
            os.seteuid(65_534)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_a_folder_that_may_not_be_read_is_not_an_empty_one(store: LocalStore) -> None:
    store.write_bytes("scores/p/part.parquet", b"")
    with closed(store.root):
        for look in (store.exists, store.stat, store.read_bytes, store.sha256, store.list):
            with pytest.raises(StorageError, match=r"permission denied \(EACCES\)"):
                look("scores/p")
    with closed(store.root / "scores"), pytest.raises(StorageError, match=r"permission denied \(EACCES\)"):
        store.list()


@pytest.mark.parametrize("command", ["status", "verify", "rescore", "report"])
def test_a_command_says_which_folder_may_not_be_read(
    store: LocalStore, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):  # whatever it imports, before the user that may import it is no more
        main([command, str(store.root)])
    store.write_bytes("manifest.json", b"{}")
    with closed(store.root), pytest.raises(SystemExit) as stop:
        main([command, str(store.root)])
    said = capsys.readouterr().err
    assert (stop.value.code, "manifest.json: permission denied" in said) == (1, True), said


def test_a_workshop_that_belongs_to_another_user_is_not_swept(store: LocalStore) -> None:
    store.write_bytes(".work/x", b"")
    with closed(store.root / ".work"):
        assert store.sweep() == ()


def test_quarantine_keeps_the_bytes_and_frees_the_name(store: LocalStore) -> None:
    store.write_bytes("scores/p/part.parquet", b"broken")
    kept = store.quarantine("scores/p/part.parquet")
    assert store.read_bytes(kept) == b"broken"
    assert kept.startswith(".work/quarantine/scores~p~part.parquet-")
    assert store.list() == ()


def test_no_file_stays_open(store: LocalStore) -> None:
    store.write_table("a.parquet", TABLE, {})
    before = shim.open_files()
    for _ in range(5):
        store.write_table("a.parquet", TABLE, {})
        store.read_table("a.parquet")
    assert shim.open_files() == before


# damage


def test_every_truncation_of_a_table_is_found(store: LocalStore, tmp_path: Path) -> None:
    store.write_table("a.parquet", TABLE, {})
    data = store.read_bytes("a.parquet")
    for length in range(0, len(data), 7):
        (store.root / "torn.parquet").write_bytes(data[:length])
        with pytest.raises(DamageError, match=r"torn\.parquet"):
            store.read_table("torn.parquet")


def test_text_that_is_not_json_is_damage(store: LocalStore) -> None:
    for data in (b"", b"{", b'{"a": 1', b"\xff\xfe", b"{}{}"):
        store.write_bytes("a.json", data)
        with pytest.raises(DamageError, match=r"a\.json"):
            store.read_json("a.json")


# faults


def _state(store: LocalStore) -> dict[str, bytes]:
    return {name: store.read_bytes(name) for name in store.list()}


@pytest.mark.parametrize("stays", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("number", FAULTS, ids=[errno.errorcode[n] for n in FAULTS])
def test_a_fault_at_any_call_leaves_the_old_or_the_new_state(tmp_path: Path, number: int, stays: bool) -> None:
    def work(store: LocalStore) -> None:
        store.write_table("scores/p/part.parquet", TABLE, {"v": "new"})
        store.write_json("commits/scores/p/0.json", {"v": "new"})

    total = len(shim.count(lambda: work(LocalStore(tmp_path / "count"))))
    assert total > 12
    for call in range(1, total + 1):
        store = LocalStore(tmp_path / f"out{call}")
        fault = shim.failing(call, lambda: OSError(number, os.strerror(number)), stays)
        with fault, pytest.raises(StorageError, match=errno.errorcode[number]) as caught:
            work(store)
        assert str(tmp_path) in str(caught.value)
        for name in store.list():
            assert name != "commits/scores/p/0.json" or store.read_json(name) == {"v": "new"}
            assert name != "scores/p/part.parquet" or store.read_table(name).num_rows == 3
        assert len(store.list(".work")) <= (1 if stays else 0)
        work(store)
        assert store.sweep() is not None
        assert store.list(".work") == ()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, shim.PowerCutError])
def test_an_interrupt_at_any_call_never_publishes_a_short_file(tmp_path: Path, stop: type[BaseException]) -> None:
    many = pa.table({"x": list(range(40_000))})
    total = len(shim.count(lambda: LocalStore(tmp_path / "count").write_table("a.parquet", many, {})))
    for call in range(1, total + 1):
        store = LocalStore(tmp_path / f"out{call}")
        with shim.failing(call, stop, afterwards=stop is shim.PowerCutError), pytest.raises(stop):
            store.write_table("a.parquet", many, {})
        assert all(store.read_table(name).num_rows == 40_000 for name in store.list())


def test_an_error_in_the_middle_of_a_stream_publishes_nothing(store: LocalStore) -> None:
    def parts() -> object:
        yield TABLE
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_tables("a.parquet", TABLE.schema, parts(), {})  # type: ignore[arg-type]
    assert store.list() == ()
    assert store.list(".work") == ()


def test_a_disk_that_returns_other_bytes_is_noticed(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage.write
    monkeypatch.setattr(storage, "write", lambda fd, data: real(fd, b"\0" * len(data)))
    with pytest.raises(StorageError, match="read back otherwise"):
        store.write_bytes("a", b"hello")
    assert store.list() == ()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synced_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    said: list[str] = []
    store = LocalStore(tmp_path / "out", said.append)
    monkeypatch.setattr(storage, "fsync_dir", refuse)
    store.write_bytes("a/b", b"1")
    store.write_table("c/d.parquet", TABLE, {})
    assert store.list() == ("a/b", "c/d.parquet")
    assert len(said) == 1
    assert "cannot sync folders" in said[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs: needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip("this container may not mount")
    try:
        store = LocalStore(mount / "out")
        store.write_table("kept.parquet", TABLE, {})
        with pytest.raises(StorageError, match=r"no space is left.*ENOSPC.*same command resumes once there is room"):
            store.write_bytes("big", os.urandom(3 << 20))
        assert store.list() == ("kept.parquet",)
        assert store.list(".work") == ()
        store.write_bytes("small", b"fits")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# sweeping


def _leftover(store: LocalStore, pid: int, host: str | None = None, age: float = 0.0) -> str:
    name = f".work/part.parquet.tmp-{pid}-{host or names.machine()}{'0' * 8}"
    store.write_bytes(name, b"half")
    os.utime(store.root / name, ((store.root / name).stat().st_mtime - age,) * 2)
    return name


def _dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_sweeping_takes_what_dead_processes_left_and_nothing_else(store: LocalStore) -> None:
    dead = _leftover(store, _dead_pid())
    earlier_life = _leftover(store, os.getpid())
    foreign_old = _leftover(store, 1, "deadbeef", age=2 * 86_400)
    alive, foreign = _leftover(store, os.getppid()), _leftover(store, 1, "feedbeef")
    store.write_bytes(".work/lock-owner.json", b"{}")
    assert set(store.sweep()) == {dead, earlier_life, foreign_old}
    assert set(store.list(".work")) == {alive, foreign, ".work/lock-owner.json"}


def test_sweeping_leaves_a_file_this_process_is_writing(store: LocalStore) -> None:
    def parts() -> object:
        yield TABLE
        assert LocalStore(store.root).sweep() == ()
        yield TABLE

    assert store.write_tables("a.parquet", TABLE.schema, parts(), {}).rows == 6  # type: ignore[arg-type]


# one writer


def _hold(root: str, ready: object, leave: object) -> None:
    with open_store(root).lock():
        ready.set()  # type: ignore[attr-defined]
        leave.wait(60)  # type: ignore[attr-defined]


def test_a_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    child = context.Process(target=_hold, args=(str(tmp_path / "out"), ready, leave))
    child.start()
    assert ready.wait(60)
    who = rf"in use by another run \(pid {child.pid} on host .*, started 20"
    with pytest.raises(UsageError, match=who), LocalStore(tmp_path / "out").lock():
        pass
    child.kill()
    child.join()
    with LocalStore(tmp_path / "out").lock():
        pass


def test_the_lock_holds_within_a_process_too(store: LocalStore) -> None:
    with store.lock(), pytest.raises(UsageError, match=f"pid {os.getpid()}"), LocalStore(store.root).lock():
        pass


def test_a_url_of_a_file_opens_a_local_store(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}").url("a") == str(tmp_path / "a")
