"""The README's set-up, test command and Python; its other commands run in test_quickstart.py, on a finished run."""

from __future__ import annotations

import pytest

from tests.e2e.readme import PROJECT, blocks, commands

TESTS = "python -m pytest -n auto --dist loadfile"


def test_the_two_commands_are_there_and_install_from_the_constraints() -> None:
    setup = [line for line in commands() if "pip install" in line]
    assert setup
    assert all("-c constraints.txt" in line for line in setup)
    assert ".venv/bin/dpo-score run pipelines/quickstart.yaml" in commands()
    assert f".venv/bin/{TESTS}" in commands()


def test_ci_calls_the_test_command() -> None:
    assert TESTS in (PROJECT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("source", blocks("python"), ids=["python"])
def test_the_python_example_runs(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(source, "README", "exec"), {})
    assert capsys.readouterr().out
