"""A first signal that comes outside of the passes: heard where a large job spends minutes, and nothing is half done."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_score.engine import resume as due
from dpo_score.engine import run as local
from dpo_score.engine.signals import StopRequest
from dpo_score.errors import Interrupted
from dpo_score.storage import file_hashes as filedigest
from dpo_score.storage.manifest import read_manifest
from dpo_score.storage.open import open_store
from tests.engine.executors.test_job_array import results
from tests.run_fixtures import Runner, preference_rows, write_rows

ROWS = 130


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.parquet", preference_rows(ROWS))


def signalled(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, after: bool = False) -> list[int]:
    """SIGTERM before the first call of a function, or after it; the calls that were made."""
    calls: list[int] = []
    real: Callable[..., Any] = getattr(place, name)

    def call(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if not after:
            signal.raise_signal(signal.SIGTERM)
        found = real(*args, **options)
        if after:
            signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(place, name, call)
    return calls


def stopped(runner: Runner, data: Path, out: Path) -> bool:
    try:
        runner(data, out)
    except Interrupted as stop:
        return stop.exit_code == 143
    return False


def test_a_look_at_committed_blocks_ends_at_the_next_one(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner(data, tmp_path / "out")
    before = results(tmp_path / "out")
    with monkeypatch.context() as patch:
        looks = signalled(patch, due, "next_action")
        assert stopped(runner, data, tmp_path / "out")
        assert len(looks) == 1
    runner(data, tmp_path / "out")
    assert results(tmp_path / "out") == before


def test_files_are_not_read_to_their_end(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled(monkeypatch, filedigest, "_hashed")
    assert stopped(runner, data, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_look_for_a_policy_whose_folder_is_gone_ends_too(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner(data, tmp_path / "out")
    looks = signalled(monkeypatch, local, "missing_of")
    with pytest.raises(Interrupted):
        runner(data, tmp_path / "out", policy=[f"better={tmp_path}/nowhere"])
    assert len(looks) == 1


def test_the_end_is_not_begun(runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signalled(monkeypatch, local, "run_stages", after=True)
    assert stopped(runner, data, tmp_path / "out")
    found = read_manifest(open_store(tmp_path / "out"))
    assert found is not None
    assert found.state == "running"
    assert not (tmp_path / "out/summary.json").exists()


def test_nothing_more_is_handed_on_after_the_signal() -> None:
    stop = StopRequest()
    items = stop.between(range(9))
    assert [next(items) for _ in range(4)] == [0, 1, 2, 3]
    stop.signal_number = signal.SIGINT
    with pytest.raises(Interrupted):
        next(items)
