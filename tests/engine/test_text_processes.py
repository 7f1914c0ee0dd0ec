"""Rendering and tokenising in processes of their own: the same blocks, one clear end."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest

from dpo_score.data.dataset import PairReader
from dpo_score.engine import text_processes
from dpo_score.engine.block_inputs import TextPlan, encoded_block
from dpo_score.engine.context import RunContext
from dpo_score.engine.plan import RowBlocks
from dpo_score.engine.prepare import resolve_plan
from dpo_score.engine.progress import Progress
from dpo_score.engine.text_processes import encoded_apart, process_count
from dpo_score.errors import TextProcessError
from dpo_score.storage.open import open_store
from tests.run_fixtures import preference_rows, write_rows

ROWS, BLOCK = 40, 3


@pytest.fixture
def plan(runner: Any, tmp_path: Path) -> TextPlan:
    """Texts and a row that is rejected, in blocks of three rows."""
    rows = preference_rows(ROWS)
    rows[7]["chosen"] = None
    config = runner.config(write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out")
    context = RunContext(open_store(tmp_path / "out"), tmp_path / "cache", Progress(quiet=True), config.compute)
    found = TextPlan.of(resolve_plan(config, context, computes=False))
    return TextPlan(found.datasets, RowBlocks(ROWS, BLOCK), found.renderer, found.extra)


def test_two_processes_give_the_blocks_of_one_in_order(plan: TextPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_processes, "RUN_ROWS", 2 * BLOCK)
    blocks = [block for block in plan.rows if block != 5]
    with encoded_apart(plan, blocks, 2, Progress(quiet=True)) as made:
        found = list(made)
    reader = PairReader(plan.datasets)
    expected = [encoded_block(plan, reader, block) for block in blocks]
    assert [text.block for text in found] == blocks
    for ours, theirs in zip(expected, found, strict=True):
        assert ours.table.equals(theirs.table, check_metadata=True)
        assert (ours.start, ours.stop, ours.rejected) == (theirs.start, theirs.stop, theirs.rejected)
    assert sum(len(text.rejected) for text in found) == 1


def test_a_process_that_is_killed_ends_the_run_with_one_sentence(
    plan: TextPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_processes, "RUN_ROWS", BLOCK)
    started: list[Any] = []
    begin = text_processes.subprocess.Popen
    monkeypatch.setattr(
        text_processes.subprocess, "Popen", lambda *a, **k: started.append(begin(*a, **k)) or started[-1]
    )
    with encoded_apart(plan, list(plan.rows), 1, Progress(quiet=True)) as made:
        blocks = iter(made)
        next(blocks)
        os.kill(started[0].pid, signal.SIGKILL)
        with pytest.raises(TextProcessError, match=r"was ended by signal 9.*the same command resumes"):
            list(blocks)
    assert started[0].poll() is not None


class AtHome:
    """A tokenizer that no other process can make."""

    def __reduce__(self) -> Any:
        raise pickle.PicklingError("it is at home here alone")


def test_what_cannot_be_sent_is_encoded_here_and_said(plan: TextPlan) -> None:
    plan.renderer.kept_here = AtHome()  # type: ignore[attr-defined]
    progress = Progress(quiet=True)
    with encoded_apart(plan, list(plan.rows), 1, progress) as made:
        assert list(made) == []
    [said] = progress.warnings
    assert "by one process, since others cannot do what it does: it is at home here alone" in said


def test_other_rules_in_a_process_are_noticed(plan: TextPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    own = plan.renderer.identity()
    monkeypatch.setattr(type(plan.renderer), "identity", lambda self: {**own, "date": "2001-01-01"})
    progress = Progress(quiet=True)
    with encoded_apart(plan, list(plan.rows), 1, progress) as made:
        assert list(made) == []
    assert "their token ids would be others" in progress.warnings[0]


def test_processes_are_for_large_sets_beside_a_gpu_or_where_they_are_asked_for() -> None:
    assert process_count(None, 10**6, "cpu") == process_count(None, 100, "cuda") == 0
    assert process_count(3, 100, "cpu") == 3
    assert process_count(0, 10**6, "cuda") == 0
