"""Threads that hand over: order, bounds, errors, and an end that leaves nothing behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.engine.progress import Progress
from dpo_score.engine.threads import background_writer, map_threads, prefetch
from tests.run_fixtures import preference_rows, write_rows


def under_way(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


@settings(deadline=None)  # threads wait for each other, longer on a busy machine
@given(st.integers(0, 60), st.integers(1, 9))
def test_at_once_keeps_the_order(count: int, width: int) -> None:
    assert list(map_threads(lambda n: n * n, range(count), width)) == [n * n for n in range(count)]


def test_at_once_takes_no_more_than_its_width_ahead_of_who_listens() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    found = map_threads(str, items(), width=4)
    assert next(found) == "0"
    assert len(taken) == 4
    found.close()
    assert under_way("at-once") == 0


def test_at_once_works_on_several_at_a_time() -> None:
    both = threading.Barrier(2)
    assert len(list(map_threads(lambda _: both.wait(60), range(2), width=2))) == 2


def test_at_once_raises_what_was_raised_in_its_place() -> None:
    found = map_threads(lambda n: 1 // n, [1, 2, 0, 3], width=4)
    assert [next(found), next(found)] == [1, 0]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert under_way("at-once") == 0


def test_ahead_keeps_the_order_and_raises_what_the_producer_raised() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise KeyError("torn")

    found = prefetch(items())
    assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="torn"):
        next(found)


def test_behind_runs_tasks_in_order_and_raises_the_first_failure() -> None:
    done: list[int] = []
    with background_writer() as submit:
        for number in range(20):
            submit(lambda number=number: done.append(number))  # type: ignore[misc]
    assert done == list(range(20))
    with pytest.raises(ZeroDivisionError), background_writer() as submit:
        submit(lambda: 1 // 0)  # type: ignore[arg-type]


def test_a_kill_costs_the_block_being_written_and_the_one_being_computed(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_score.engine import prepare
    from dpo_score.engine import run as local

    begun, committed, uncommitted = [0], [0], []
    commit = local.commit

    class Begun(Progress):
        def block(self, rows: int, tokens: int) -> None:
            begun[0] += 1
            uncommitted.append(begun[0] - committed[0])

    def slowly(*args: Any) -> None:
        time.sleep(0.05)
        commit(*args)
        committed[0] += 1

    monkeypatch.setattr(prepare, "block_rows", lambda *_: 4)
    monkeypatch.setattr(local, "commit", slowly)
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(40))
    local.run(runner.config(data, tmp_path / "out"), Begun(quiet=True))
    assert max(uncommitted) <= 2


def test_blocks_in_memory_stay_few_behind_a_slow_writer(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_score.engine import block_inputs as texts
    from dpo_score.engine import prepare
    from dpo_score.engine import run as local

    read, written, unwritten = [0], [0], []
    make, write = texts.BlockTexts.block, local.write_block

    def made(*args: Any) -> Any:
        read[0] += 1
        unwritten.append(read[0] - written[0])
        return make(*args)

    def slowly(*args: Any) -> Any:
        time.sleep(0.02)
        written[0] += 1
        return write(*args)

    monkeypatch.setattr(prepare, "block_rows", lambda *_: 4)
    monkeypatch.setattr(texts.BlockTexts, "block", made)
    monkeypatch.setattr(local, "write_block", slowly)
    runner(write_rows(tmp_path / "pairs.parquet", preference_rows(80)), tmp_path / "out")
    assert written[0] == read[0] == 40  # both stages
    assert 1 < max(unwritten) <= 5  # read ahead, waiting to be read, computed, waiting to be written, written
