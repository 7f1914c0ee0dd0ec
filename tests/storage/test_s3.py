"""The remote store against a server that speaks S3 (s3_server.py)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import s3fs

from dpo_score.errors import StorageError, UsageError
from dpo_score.storage.base import Store
from dpo_score.storage.cache.cache import open_cache
from dpo_score.storage.commits import commit, read_record
from dpo_score.storage.open import open_store
from tests.storage.cache.test_cache import FIELDS, agree, block, key
from tests.storage.s3_server import Fault, Server, free_port
from tests.storage.test_commits import RECORD
from tests.storage.test_powerloss import run
from tests.storage.test_resume import Action

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
BUCKET = "s3://bucket"

DYING_RUN = """
import sys
from tests.storage.test_powerloss import run
from tests.storage.test_commits import RECORD
from tests.storage.test_s3 import dying
run(dying(*sys.argv[1:]))
"""


def test_tables_json_and_listings(server: Server) -> None:
    store = open_store(f"{BUCKET}/a folder/é")
    table = pa.table({"x": [1, None]})
    record = store.write_table("scores/p/part.parquet", table, {"k": "v"})
    assert store.read_table(record.name).to_pydict() == {"x": [1, None]}
    assert store.sha256(record.name) == record.sha256
    stat = store.stat(record.name)
    assert stat is not None
    assert (stat.size, abs(stat.modified - time.time()) < 600) == (record.size, True)
    assert store.write_json("m.json", {}, if_absent=True)
    assert not store.write_json("m.json", {"other": 1}, if_absent=True)
    assert store.read_json("m.json") == {}
    assert store.list() == ("m.json", "scores/p/part.parquet")
    with pytest.raises(StorageError, match=r"s3://bucket/a folder/é/nothing: it is not there"):
        store.read_bytes("nothing")


def test_a_large_object_is_uploaded_in_parts(server: Server) -> None:
    store = open_store(f"{BUCKET}/large")
    table = pa.table({"x": [os.urandom(60 << 20) for _ in range(2)]})
    record = store.write_table("big.parquet", table, {})
    assert record.size > 100 << 20
    assert store.sha256("big.parquet") == record.sha256


def test_one_run_at_a_time(server: Server) -> None:
    first, second = (open_store(f"{BUCKET}/leased") for _ in range(2))
    with first.lock(), pytest.raises(UsageError, match=f"pid {os.getpid()}"), second.lock():
        pass
    with second.lock():
        pass
    assert first.list(".work") == ()


def test_a_run_continues_where_it_was_killed(server: Server) -> None:
    golden = open_store(f"{BUCKET}/golden")
    run(golden)
    for number in (1, 3, 6, 8):
        url = f"{BUCKET}/killed-{number}"
        command = [sys.executable, "-c", DYING_RUN, url, str(number)]
        child = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, timeout=120)
        assert child.returncode == -signal.SIGKILL, child.stderr.decode()
        store = open_store(url)
        assert set(run(store)) <= {Action.SKIP, Action.REDO}
        assert store.list() == golden.list()
        assert all(store.read_bytes(name) == golden.read_bytes(name) for name in store.list())


def dying(url: str, number: str) -> Store:
    """A store whose process is killed just after its `number`-th upload."""
    from dpo_score.storage import io as storage

    real, left = storage.put, [int(number)]

    def put(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    storage.put = put  # type: ignore[assignment]
    return open_store(url)


def test_the_cache(server: Server) -> None:
    space = open_cache(f"{BUCKET}/cache").namespace(FIELDS)
    for n in range(5):
        space.add(f"b{n}", block(10 * n, 10 * n + 10))
    space.compact()
    keys = [key(n) for n in range(0, 60, 3)]
    found = space.view(space.snapshot()).lookup(keys)
    assert agree(found, {k: e for k, e in block(0, 50).items() if k in keys})
    assert open_cache(f"{BUCKET}/cache").gc(max_bytes=0).files == 5


@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD", "DELETE"])
@pytest.mark.parametrize("status", [500, 503])
def test_a_request_that_fails_is_sent_again(server: Server, method: str, status: int) -> None:
    store = open_store(f"{BUCKET}/again-{method}-{status}")
    server.seen()
    server.plan(Fault(method, "again", status))
    assert store.write_json("m.json", {"a": 1}, if_absent=True)
    assert store.exists("m.json")
    assert store.read_json("m.json") == {"a": 1}
    assert store.list() == ("m.json",)
    store.remove("m.json")
    server.plan()
    failed = [line.split("?")[0] for line in server.seen() if line.startswith(f"{method} ")]
    assert failed[0] == failed[1]
    assert store.list() == ()


def test_an_answer_that_is_lost_after_the_work_was_done(server: Server) -> None:
    store = open_store(f"{BUCKET}/lost")
    server.plan(Fault("PUT", "commits", 500, applied=True))
    commit(store, RECORD)
    server.plan()
    assert read_record(store, RECORD.name) == RECORD


def test_a_server_that_is_gone_is_a_storage_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"s3://bucket/x/a"):
        open_store(f"{BUCKET}/x").write_bytes("a", b"")
    s3fs.S3FileSystem.clear_instance_cache()
