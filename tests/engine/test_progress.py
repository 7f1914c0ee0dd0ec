"""What a run says where there is no terminal: a line now and then for the stage that is open, a last one at its end."""

from __future__ import annotations

import io

import pytest

from dpo_score.engine import progress
from dpo_score.engine.progress import Progress


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", -1.0)
    return io.StringIO()


def test_a_stage_says_how_far_it_is_and_what_it_came_to(stream: io.StringIO) -> None:
    voice = Progress(stream=stream)
    with voice.stage("better", rows=8, done=4):
        voice.block(rows=4, tokens=100)
        voice.tokens(50)
        assert stream.getvalue().startswith("better: 6/8 rows, ")
        voice.rows(4)
    assert stream.getvalue().splitlines()[-1].startswith("better: 8 rows, ")


def test_outside_of_a_stage_nothing_is_said(stream: io.StringIO) -> None:
    voice = Progress(stream=stream)
    voice.tokens(50)
    with voice.stage("better", rows=8):
        pass
    voice.tokens(50)
    assert stream.getvalue() == ""


def test_a_quiet_run_says_its_warnings_once(stream: io.StringIO) -> None:
    voice = Progress(quiet=True, stream=stream)
    with voice.stage("better", rows=8):
        voice.tokens(50)
        voice.warn("12 pairs are odd", example=": \x1b[31mred")
        voice.warn("12 pairs are odd")
    assert stream.getvalue() == "warning: 12 pairs are odd: \\x1b[31mred\n"
    assert voice.warnings == ["12 pairs are odd"]
