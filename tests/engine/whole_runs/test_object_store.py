"""The whole pipeline with data, cache and OUT on an S3 server: killed in the middle, resumed, verified.

One process, shares, and a Ray cluster: each leaves the bytes of a run on local files.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import s3fs

from dpo_score.config.load import load_config
from dpo_score.engine import run as local
from dpo_score.engine.executors import choose as engines
from dpo_score.engine.executors import job_array
from dpo_score.engine.progress import Progress
from dpo_score.errors import DataError, StorageError
from dpo_score.results.verify.verify import verify
from dpo_score.storage.open import open_store
from tests.engine.executors.test_job_array import results
from tests.run_fixtures import Runner, preference_rows, write_rows
from tests.storage.s3_server import ROOT, Fault, Server

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
QUIET = Progress(quiet=True)
BLOCKS = 5
DATA = "s3://bucket/data/pairs.parquet"


@pytest.fixture(scope="module")
def pairs(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set, on disk and at DATA."""
    rows = preference_rows(64 * BLOCKS - 10)
    rows[130]["chosen"] = None
    path = write_rows(tmp_path_factory.mktemp("data") / "pairs.parquet", rows)
    s3fs.S3FileSystem().put_file(str(path), DATA)
    return path


@pytest.fixture(scope="module")
def golden(pairs: Path, models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process leaves on a local disk."""
    folder = tmp_path_factory.mktemp("golden")
    local.run(Runner(folder / "cache", models).config(pairs, folder / "out"), QUIET)
    return results(folder / "out")


class Place:
    """An OUT and a cache on the server, of one test; the machine's own cache folder is empty."""

    def __init__(self, server: Server, name: str, models: Mapping[str, Path]) -> None:
        self.server, self.models = server, models
        self.out, self.cache = f"s3://bucket/{name}/out", f"s3://bucket/{name}/cache"

    def config(self, data: str = DATA, **options: Any) -> Any:
        models = {"reference": str(self.models["reference"]), "policy": [f"better={self.models['better']}"]}
        given = {"data": [data], "out": self.out, "cache_dir": self.cache, "threads": 1, **models, **options}
        return load_config(None, given, environment={})

    def start(self, *more: str, within: Sequence[str] = ()) -> subprocess.Popen[str]:
        """The command in a process of its own, `within` another command that starts it."""
        words = ["--data", DATA, "--reference", self.models["reference"], "--policy", f"better={self.models['better']}"]
        words += ["--out", self.out, "--cache-dir", self.cache, "--threads", "1", *more]
        command = [*within, sys.executable, "-m", "dpo_score", "run", *map(str, words)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def kill(self, at: str, number: int, *more: str) -> None:
        """Run until the server is sent the `number`-th object below `at`: it is stored, and the sender dies."""
        process = self.start(*more)
        self.server.plan(Fault("PUT", at, count=1, skip=number - 1, applied=True, kill=process.pid))
        said, _ = process.communicate(timeout=300)
        self.server.plan()
        assert process.returncode == -signal.SIGKILL, said

    def finish(self, *more: str) -> None:
        process = self.start(*more)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said

    def contents(self) -> dict[str, bytes]:
        store, kept = open_store(self.out), ("scores/", "reference/", "rejects/", "summary.json", "README.md")
        return {name: store.read_bytes(name) for name in store.list() if name.startswith(kept)}

    def records(self) -> list[str]:
        return [name for name in open_store(self.out).list("commits") if name != "commits/manifest.json"]


@pytest.fixture
def place(
    server: Server, request: pytest.FixtureRequest, models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    monkeypatch.setenv("DPO_SCORE_CACHE_DIR", str(request.getfixturevalue("tmp_path") / "of-this-machine"))
    server.plan()
    server.seen()
    yield Place(server, re.sub(r"\W+", "-", request.node.name), models)
    server.plan()


def records_put(seen: list[str]) -> Counter[str]:
    """How often each commit record was sent."""
    return Counter(line for line in seen if line.startswith("PUT ") and "/commits/" in line and "-of-" in line)


def test_one_process_killed_in_both_stages(place: Place, golden: dict[str, bytes]) -> None:
    place.kill("/commits/reference/", 2)
    assert place.records() == [f"commits/reference/{block:05d}-of-{BLOCKS:05d}.json" for block in range(2)]
    place.kill("/scores/better/part-", 3)
    place.finish()
    assert place.contents() == golden
    verify(place.out).raise_damage()
    assert set(records_put(place.server.seen()).values()) == {1}


def test_a_share_killed_in_the_middle(place: Place, golden: dict[str, bytes]) -> None:
    place.kill("/commits/reference/", 1, "--blocks", "0/2")
    for share in ("1/2", "0/2"):
        engines.run(place.config(blocks=share), QUIET)
    job_array.finish(place.out, QUIET)
    assert place.contents() == golden
    verify(place.out).raise_damage()


@pytest.mark.skipif(os.environ.get("DPO_SCORE_CRASH") != "full", reason="a share and a driver killed are tested each")
def test_the_driver_of_a_ray_cluster_killed(place: Place, golden: dict[str, bytes]) -> None:
    ray = ("--engine", "ray", "--workers", "2")
    place.kill("/commits/reference/", 2, *ray)
    assert 2 <= len(place.records()) < 2 * BLOCKS
    place.finish(*ray)
    assert place.contents() == golden
    verify(place.out).raise_damage()
    assert not [each for each in psutil.process_iter(["cmdline"]) if place.out in " ".join(each.info["cmdline"] or ())]


CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc")
"""As in a container, the process is number 1 there, and its host has the name of the others'."""


containers = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*CONTAINER, "true"], capture_output=True).returncode != 0,
    reason="this machine allows no new PID namespace",
)


@containers
def test_containers_of_one_host_name_share_a_cache_and_a_folder(place: Place, golden: dict[str, bytes]) -> None:
    """Two runs of one folder, and one of another folder with the same cache, all at once and each process 1 of its own.

    The lease of the first is not taken for that of a dead process of the second's machine: it is refused. What the
    third finds in the cache are whole values.
    """
    other = Place(place.server, "another-folder", place.models)
    other.cache = place.cache
    started = [each.start(within=CONTAINER) for each in (place, place, other)]
    said = [process.communicate(timeout=300)[0] for process in started]
    codes = [process.returncode for process in started]
    assert codes[2] == 0, said[2]
    assert sorted(codes[:2]) == [0, 2], said
    assert "is in use by another run (pid 1 on host" in " ".join(said[codes.index(2)].split())
    for each in (place, other):
        assert each.contents() == golden
        verify(each.out).raise_damage()


@containers
@pytest.mark.skipif(os.environ.get("DPO_SCORE_CRASH") != "full", reason="whole runs in containers are tested each")
def test_containers_of_one_host_name_take_shares_of_a_folder(place: Place, golden: dict[str, bytes]) -> None:
    halves = [place.start("--blocks", half, within=CONTAINER) for half in ("0/2", "1/2")]
    said = [half.communicate(timeout=300)[0] for half in halves]
    assert [half.returncode for half in halves] == [0, 0], said
    job_array.finish(place.out, QUIET)
    assert place.contents() == golden


# requests that fail


def passing_faults() -> list[Fault]:
    """Errors that go away: before a request is carried out, and after it was (its answer is lost)."""
    return [
        Fault("PUT", "/scores/better/part-", 503, count=2),
        Fault("PUT", "/commits/reference/00001", 500, count=1, applied=True),
        Fault("PUT", "/out/commits/manifest.json", 503, count=1, applied=True),
        Fault("PUT", "/.work/lease", 503, count=1, applied=True),
        Fault("HEAD", "/out/", 503, count=1, skip=4),
        Fault("GET", "/data/pairs.parquet", 500, count=2),
        Fault("GET", "/bucket", 503, count=1, skip=12),
    ]


def test_errors_that_pass_are_not_noticed(place: Place, golden: dict[str, bytes]) -> None:
    place.server.plan(*passing_faults())
    progress = Progress(quiet=True)
    engines.run(place.config(), progress)
    assert progress.warnings == []
    assert place.contents() == golden
    lines = [line for line in place.server.seen() if line.startswith("PUT ") and "/scores/better/part-00000" in line]
    assert len(lines) == 3
    verify(place.out).raise_damage()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One try where the library makes five; its own back-off stays."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("status", [500, 503])
def test_errors_that_stay_end_the_run_which_resumes(
    place: Place, golden: dict[str, bytes], status: int, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("impatient")
    place.server.plan(Fault("PUT", "/commits/scores/better/00001", status, count=10**6))
    with pytest.raises(StorageError, match=r"s3://bucket/.*/00001-of-00005\.json: .*the same command resumes"):
        engines.run(place.config(), QUIET)
    sent = [line for line in place.server.seen() if "PUT" in line and "/commits/scores/better/00001" in line]
    assert 1 <= len(sent) <= 5
    place.server.plan()
    engines.run(place.config(), QUIET)
    assert place.contents() == golden
    again = records_put(place.server.seen())
    assert not any("/reference/" in line for line in again)


def test_data_that_changes_on_the_server_is_refused(place: Place, golden: dict[str, bytes], pairs: Path) -> None:
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    mine = f"s3://bucket/{place.out.split('/')[3]}/pairs.parquet"
    fs.put_file(str(pairs), mine)

    class Changed(Progress):
        def rows(self, count: int) -> None:
            fs.pipe_file(mine, pairs.read_bytes() + b"PAR1")

    with pytest.raises(DataError, match=rf"{mine} changed while it was being scored"):
        engines.run(place.config(data=mine), Changed(quiet=True))


def test_data_that_cannot_be_reached_is_one_paragraph(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/nothing\.parquet does not exist"):
        engines.run(place.config(data="s3://bucket/nothing.parquet"), QUIET)
    place.server.plan(Fault("HEAD", "/data/", 503, count=10**6), Fault("GET", "/data/", 503, count=10**6))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises((DataError, StorageError), match=r"s3://bucket/data"):
        engines.run(place.config(), QUIET)
    fsspec.filesystem("s3").clear_instance_cache()
