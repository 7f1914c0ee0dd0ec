"""What a template did to more than one pair in a hundred is said by every command that renders, with a pair to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.export.precompute import precompute
from tests.run_fixtures import Runner, preference_rows, write_rows

STRIPPED = (
    "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def thoughts(count: int) -> list[dict[str, Any]]:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    sides = {"chosen": turn("assistant", "<think>a\x1b</think>yes"), "rejected": turn("assistant", "no")}
    return [{"prompt": turn("user", f"hi {i}"), **sides} for i in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "chat.parquet", thoughts(70))


EXPECTED = [
    "content_altered: the chat template changed or dropped text of the messages: 70 of 70 pairs, e.g. row 0:0",
    "no_eos: the rendering ends without an end-of-turn token: 70 of 70 pairs, e.g. row 0:0",
]
EXAMPLE = ": 'hi 0' → '<think>a\\x1b</think>yes'"


def refuse_others(progress: Progress, printed: str) -> None:
    """Texts of the data are shown where the run is watched; what is kept with it names the row alone."""
    assert [line for line in progress.warnings if "pairs, e.g." in line] == EXPECTED
    assert all(f"warning: {line}{EXAMPLE}\n" in printed for line in EXPECTED)


@pytest.mark.parametrize("command", ["run", "precompute", "precompute into the cache"])
def test_each_command_warns_with_an_example(
    runner: Runner, data: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = None if command.endswith("cache") else tmp_path / "out"
    config, progress = runner.config(data, out, chat_template=STRIPPED), Progress(quiet=True)
    if command == "run":
        run(config, progress)
    else:
        precompute(config, progress)
    refuse_others(progress, capsys.readouterr().err)


def test_a_resumed_run_shows_the_same_example(
    runner: Runner, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(runner.config(data, tmp_path / "out", chat_template=STRIPPED, limit=64), Progress(quiet=True))
    progress = Progress(quiet=True)
    capsys.readouterr()
    run(runner.config(data, tmp_path / "out", chat_template=STRIPPED), progress)
    refuse_others(progress, capsys.readouterr().err)


@pytest.mark.parametrize(("same", "warned"), [(30, True), (1, False)])
def test_pairs_whose_answers_are_the_same_are_worth_a_warning(
    runner: Runner, tmp_path: Path, same: int, warned: bool
) -> None:
    rows = preference_rows(100)
    for row in rows[-same:]:
        row["rejected"] = row["chosen"]
    progress = Progress(quiet=True)
    run(runner.config(write_rows(tmp_path / "same.parquet", rows), tmp_path / "out"), progress)
    said = [line for line in progress.warnings if line.startswith("identical_pair: both answers are the same")]
    assert len(said) == warned
    assert all(line.endswith("30 of 100 pairs, e.g. row 0:70") for line in said)
