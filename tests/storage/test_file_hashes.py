"""Digests of files: right, remembered, and forgotten when the file may have changed."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from dpo_score.errors import Interrupted, StorageError
from dpo_score.storage import file_hashes as filedigest
from dpo_score.storage.file_hashes import FileDigests
from dpo_score.storage.local import LocalStore
from tests.storage import shim


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as settled at once."""
    monkeypatch.setattr(filedigest, "SETTLED_NS", -1)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths whose bytes were read."""
    seen: list[str] = []
    real = filedigest._hashed
    monkeypatch.setattr(filedigest, "_hashed", lambda path, check: seen.append(path) or real(path, check))
    return seen


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_second_run_reads_nothing(tmp_path: Path, weights: Path, reads: list[str]) -> None:
    for _ in range(3):
        assert FileDigests(tmp_path / "cache").sha256(weights) == sha(b"weights")
    assert reads == [str(weights)]


def test_a_link_is_the_file_it_leads_to(tmp_path: Path, weights: Path, reads: list[str]) -> None:
    (tmp_path / "link").symlink_to(weights)
    digests = FileDigests(tmp_path / "cache")
    assert digests.sha256(weights) == digests.sha256(tmp_path / "link")
    assert len(reads) == 1


def test_another_content_of_equal_size_and_time_is_read_again(tmp_path: Path, weights: Path, reads: list[str]) -> None:
    digests = FileDigests(tmp_path / "cache")
    digests.sha256(weights)
    before = weights.stat()
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digests.sha256(weights) == sha(b"WEIGHTS")


def test_a_replaced_file_is_read_again(tmp_path: Path, weights: Path) -> None:
    digests = FileDigests(tmp_path / "cache")
    digests.sha256(weights)
    (tmp_path / "new").write_bytes(b"Weights")
    (tmp_path / "new").replace(weights)
    assert digests.sha256(weights) == sha(b"Weights")


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "fresh"
    path.write_bytes(b"x")
    assert FileDigests(tmp_path / "cache").sha256(path) == sha(b"x")
    assert LocalStore(tmp_path / "cache").list() == ()


def test_a_damaged_memory_is_not_believed(tmp_path: Path, weights: Path) -> None:
    digests = FileDigests(tmp_path / "cache")
    digests.sha256(weights)
    (entry,) = (tmp_path / "cache" / "file-digests").iterdir()
    for bit in range(0, entry.stat().st_size * 8, 3):
        shim.flip(entry, bit)
        assert digests.sha256(weights) == sha(b"weights"), bit
    for text in (b"", b"[]", b"{}", b"null"):
        entry.write_bytes(text)
        assert digests.sha256(weights) == sha(b"weights")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = filedigest._hashed

    def slow(path: str, check: Callable[[], object]) -> str:
        found = real(path, check)
        with Path(path).open("ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(filedigest, "_hashed", slow)
    with pytest.raises(StorageError, match="keeps changing"):
        FileDigests(tmp_path / "cache").sha256(weights)


def test_reading_ends_between_two_chunks_when_it_is_to_stop(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []

    def check() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(filedigest, "CHUNK_BYTES", 2)
    digests = FileDigests(tmp_path / "cache", check)
    with pytest.raises(Interrupted):
        digests.sha256(weights)
    assert digests.sha256(weights) == sha(b"weights"), "nothing of the first half was kept"
    assert len(looks) == 3 + 4
    assert digests.sha256(weights) == sha(b"weights")
    assert len(looks) == 3 + 4, "a remembered digest takes no time"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"gone: it is not there"):
        FileDigests(tmp_path / "cache").sha256(tmp_path / "gone")


@pytest.fixture
def url() -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/pairs.parquet", b"pairs")
    yield "memory://bucket/pairs.parquet"
    memory.store.clear()


def test_an_object_is_read_once_until_it_changes(tmp_path: Path, url: str, reads: list[str]) -> None:
    for _ in range(3):
        assert FileDigests(tmp_path / "cache").sha256(url) == sha(b"pairs")
    assert reads == [url]
    fsspec.filesystem("memory").pipe_file("/bucket/pairs.parquet", b"PAIRS")
    assert FileDigests(tmp_path / "cache").sha256(url) == sha(b"PAIRS")


def test_an_object_that_is_not_there(tmp_path: Path, url: str) -> None:
    with pytest.raises(StorageError, match=r"memory://bucket/gone: it is not there"):
        FileDigests(tmp_path / "cache").sha256("memory://bucket/gone")
