"""Several runs that divide one folder: each holds its share, and none of them meets a whole run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from dpo_score.errors import UsageError
from dpo_score.storage import locks
from dpo_score.storage.base import Store
from dpo_score.storage.open import open_store


@pytest.fixture(params=["disk", "objects"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(locks, "SHARE_SECONDS", 0.0)
    monkeypatch.setattr(locks, "LEASE_SHARE_SECONDS", 0.0)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.01)
    yield str(tmp_path / "out") if request.param == "disk" else "memory://shares/out"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def first(where: str) -> Store:
    return open_store(where)


@pytest.fixture
def second(where: str) -> Store:
    return open_store(where)


def refused(store: Store, share: str | None = None) -> bool:
    try:
        with store.share(share) if share else store.lock():
            return False
    except UsageError as error:
        return "is in use by another run" in str(error)


def test_two_shares_work_side_by_side(first: Store, second: Store) -> None:
    with first.share("0-of-2"), second.share("1-of-2"):
        first.write_json("a.json", 1)
        second.write_json("b.json", 2)
    assert first.list() == ("a.json", "b.json")


def test_one_share_has_one_holder(first: Store, second: Store) -> None:
    with first.share("0-of-2"):
        assert refused(second, "0-of-2")
    assert not refused(second, "0-of-2")


def test_a_whole_run_waits_for_no_share_and_no_share_for_a_whole_run(first: Store, second: Store) -> None:
    with first.share("0-of-2"):
        assert refused(second)
    with first.lock():
        assert refused(second, "0-of-2")
    assert not refused(second)


def test_turns_come_one_after_another(first: Store, second: Store) -> None:
    order: list[str] = []

    def other() -> None:
        with second.turn():
            order.append("second")

    with first.share("0-of-2"), second.share("1-of-2"):
        with first.turn():
            waiting = threading.Thread(target=other)
            waiting.start()
            waiting.join(0.1)
            order.append("first")
        waiting.join()
    assert order == ["first", "second"]
