"""Whole runs, OUT and CACHE on object stores: memory://, and s3:// by moto's server (tests/storage/s3_server.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dpo_score.results import cache_admin as cachework
from dpo_score.results.rescore import rescore
from dpo_score.results.status import status
from dpo_score.results.verify.verify import verify
from dpo_score.storage import io as storage
from dpo_score.storage.base import Store
from dpo_score.storage.open import open_store
from tests.run_fixtures import Runner, preference_rows, write_rows
from tests.storage.shim import PowerCutError

RESULTS = ("scores", "reference", "rejects", "summary.json", "README.md")
PLACES = ["memory://bucket", pytest.param("s3", marks=pytest.mark.slow)]


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty place: objects in memory, or a bucket of a server that speaks S3."""
    if request.param == "s3":
        request.getfixturevalue("server")
        yield f"s3://bucket/{request.node.name.split('[')[0]}"
        return
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield request.param
    memory.store.clear()


class Remote:
    """One job, with its results and its cache under a URL."""

    def __init__(self, bucket: str, data: Path, models: Mapping[str, Path]) -> None:
        self.bucket, self.data, self.models = bucket, data, models

    def __call__(self, out: str = "out", cache: str = "cache", **options: Any) -> Store:
        runner = Runner(Path("unused"), self.models)
        policies = [f"{name}={self.models[name]}" for name in ("better", "worse")]
        where = {"out": f"{self.bucket}/{out}", "cache_dir": f"{self.bucket}/{cache}"}
        from dpo_score.engine.progress import Progress
        from dpo_score.engine.run import run

        config = runner.config(self.data, None, path="plain", policy=policies, **options)
        run(config.model_copy(update=where), Progress(quiet=True))
        return open_store(where["out"])


@pytest.fixture
def remote(bucket: str, tmp_path: Path, models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> Remote:
    monkeypatch.setenv("DPO_SCORE_CACHE_DIR", str(tmp_path / "of-this-machine"))
    rows = preference_rows(70)
    rows[5]["chosen"] = None
    return Remote(bucket, write_rows(tmp_path / "pairs.parquet", rows), models)


def contents(store: Store) -> dict[str, bytes]:
    return {name: store.read_bytes(name) for name in store.list() if name.split("/")[0] in RESULTS}


class Puts:
    """Every upload by its path; the process "dies" at upload number `dies`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies: int | None = None) -> None:
        self.paths: list[str] = []
        self.dies = dies
        real = storage.put

        def put(fs: Any, path: str, *rest: Any) -> None:
            self.paths.append(path)
            if self.dies is not None and len(self.paths) >= self.dies:
                raise PowerCutError
            real(fs, path, *rest)

        monkeypatch.setattr(storage, "put", put)


@pytest.mark.parametrize("bucket", PLACES, indirect=True)
def test_a_run_on_an_object_store_gives_the_bytes_of_a_local_one(
    remote: Remote, runner: Runner, tmp_path: Path, forwards: list[int]
) -> None:
    store = remote()
    policies = [f"{name}={remote.models[name]}" for name in ("better", "worse")]
    runner(remote.data, tmp_path / "local", path="plain", policy=policies)
    local = open_store(tmp_path / "local")
    assert contents(store) == contents(local)
    out = f"{remote.bucket}/out"
    assert verify(out).damage == []
    assert status(out)["state"] == "complete"
    assert {row["policy"] for row in rescore(out, "ipo", "0.5", None, [], None)["rows"]} == {"better", "worse"}
    assert cachework.ls(f"{remote.bucket}/cache")[0]["entries"] > 0
    assert "nothing damaged" in cachework.verify(f"{remote.bucket}/cache")
    assert not (tmp_path / "of-this-machine/logps").exists()
    forwards.clear()
    again = remote(out="again")
    assert forwards == []
    assert {k: v for k, v in contents(again).items() if k.endswith("parquet")} == {
        k: v for k, v in contents(store).items() if k.endswith("parquet")
    }


@pytest.mark.parametrize("bucket", PLACES, indirect=True)
def test_records_go_after_their_files_and_completion_last(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    puts = Puts(monkeypatch)
    store = remote()
    paths = [path.partition("/out/")[2] for path in puts.paths if "/out/" in path and ".work/" not in path]
    records = [path for path in paths if path.startswith("commits/") and path != "commits/manifest.json"]
    assert len(records) == 6
    for name in records:
        for file in store.read_json(name)["files"]:
            assert paths.index(file["name"]) < paths.index(name)
    ends = [path for path in paths if path not in ("report.html", "audit.parquet")]
    assert ends[-2:] == ["commits/manifest.json", "manifest.json"]


@pytest.mark.parametrize("bucket", ["memory://bucket"], indirect=True)
def test_a_run_that_dies_at_any_upload_goes_on(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        puts = Puts(patch)
        golden = contents(remote(out="golden", cache="golden-cache"))
    assert golden
    for number in range(2, len(puts.paths), max(len(puts.paths) // 4, 1)):
        with monkeypatch.context() as patch:
            Puts(patch, dies=number)
            with pytest.raises(PowerCutError):
                remote(out=f"out{number}", cache=f"cache{number}")
        found = contents(remote(out=f"out{number}", cache=f"cache{number}"))
        assert found == golden, number
        assert verify(f"{remote.bucket}/out{number}").damage == []


@pytest.mark.parametrize("bucket", ["memory://bucket"], indirect=True)
def test_a_flipped_bit_in_an_object_is_found_and_mended(remote: Remote) -> None:
    store = remote()
    before = contents(store)
    name = next(name for name in store.list("scores/better"))
    spoilt = bytearray(store.read_bytes(name))
    spoilt[len(spoilt) // 2] ^= 1
    store.write_bytes(name, bytes(spoilt))
    assert [file for file, _ in verify(f"{remote.bucket}/out").damage] == [name]
    assert contents(remote()) == before


@pytest.mark.parametrize("bucket", ["memory://bucket"], indirect=True)
def test_the_manifest_says_where_numbers_came_from_and_no_secret(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    manifest = remote().read_json("manifest.json")
    assert "hush-hush" not in json.dumps(manifest)
    assert manifest["state"] == "complete"
