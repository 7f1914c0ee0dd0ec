"""Every command of the README works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.e2e.test_quickstart import PROJECT, main_ok, out, workplace  # noqa: F401 - fixtures

README = (PROJECT / "README.md").read_text()
TESTS = "python -m pytest -n auto --dist loadfile"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Each command line of the README, continuation lines joined."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [part.strip() for line in text.splitlines() for part in line.split("&&") if part.strip()]


def own_commands() -> list[list[str]]:
    lines = (shlex.split(line, comments=True) for line in commands())
    return [words[1:] for words in lines if words and words[0].removeprefix(".venv/bin/") == "dpo-score"]


def test_the_two_commands_are_there_and_install_from_the_constraints() -> None:
    setup = [line for line in commands() if "pip install" in line]
    assert setup
    assert all("-c constraints.txt" in line for line in setup)
    assert ".venv/bin/dpo-score run pipelines/quickstart.yaml" in commands()
    assert f".venv/bin/{TESTS}" in commands()


def test_ci_calls_the_test_command() -> None:
    assert TESTS in (PROJECT / ".ci/run").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("words", own_commands(), ids=" ".join)
def test_each_command_works_after_the_quickstart(
    words: list[str],
    out: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    main_ok(*words)
    assert capsys.readouterr().out


@pytest.mark.parametrize("source", blocks("python"), ids=["python"])
def test_the_python_example_runs(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(source, "README", "exec"), {})
    assert capsys.readouterr().out
