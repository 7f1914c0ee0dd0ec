"""Seconds of the search that `python -m tests.fuzz` goes on with for an hour, and what it once found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import BOMB, LOOP, failures

SECONDS = 60.0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_nothing_odd_ends_a_command_in_a_traceback(tmp_path: Path) -> None:
    assert list(failures(tmp_path, SECONDS)) == []


@pytest.mark.parametrize("text", [BOMB, LOOP])
def test_aliases_that_stand_for_too_much_are_refused_at_once(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dpo_score.cli.main import main

    (tmp_path / "pipeline.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(tmp_path / "pipeline.yaml"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "alias" in " ".join(capsys.readouterr().err.split())
