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


def test_rows_from_the_cache_have_a_speed_and_say_where_they_come_from(stream: io.StringIO) -> None:
    voice = Progress(stream=stream)
    with voice.stage("better", rows=8):
        voice.block(rows=4, tokens=100)
        voice.rows(4)
        assert "from the cache" in stream.getvalue()
        assert ", 0 tok/s" not in stream.getvalue()
        voice.block(rows=4, tokens=300)
        voice.tokens(300)
        voice.rows(4)
    assert stream.getvalue().splitlines()[-1].endswith("(25% from the cache)")


def test_each_stage_has_its_place_and_the_time_of_the_whole_run(stream: io.StringIO) -> None:
    voice = Progress(stream=stream)
    with voice.run(3):
        voice.nothing_to_do("reference")
        with voice.stage("better", rows=8):
            voice.block(rows=4, tokens=100)
            voice.rows(4)
    line = stream.getvalue().splitlines()[0]
    assert line.startswith("2 of 3: better: 4/8 rows, ")
    assert line.endswith("for the whole run")


@pytest.mark.parametrize(("seconds", "said"), [(45, "45 s"), (600, "10 min"), (12_000, "3 h 20 min")])
def test_times_are_said_in_the_unit_that_one_thinks_in(seconds: float, said: str) -> None:
    assert progress.clock(seconds) == said
