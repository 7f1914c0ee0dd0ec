"""The README's set-up, test command and Python; its other commands run in test_quickstart.py, on a finished run."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.e2e.readme import PAGES, PROJECT, blocks, commands

TESTS = "python -m pytest -n auto --dist loadfile"


def test_the_two_commands_are_there_and_install_from_the_constraints() -> None:
    setup = [line for line in commands() if "pip install" in line]
    assert setup
    assert all("-c constraints.txt" in line for line in setup)
    assert ".venv/bin/dpo-score quickstart" in commands()
    assert f".venv/bin/{TESTS}" in commands()


def test_ci_calls_the_test_command() -> None:
    assert TESTS in (PROJECT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("source", blocks("python"), ids=["python"])
def test_the_python_example_runs(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(source, "README", "exec"), {})
    assert capsys.readouterr().out


def test_the_first_page_is_short_and_its_links_lead_somewhere() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 120
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((PROJECT / page).parent / target).exists(), (page, target)


def test_every_recipe_s_file_is_named_on_the_page() -> None:
    files = {path.name for path in (PROJECT / "pipelines").iterdir()} - {"README.md", "GUARANTEES.md", "SCALE.md"}
    assert {name for name in files if name not in PAGES["pipelines/README.md"]} == set()


def test_the_house_names_what_is_there() -> None:
    """Every path and every `word` of the layout's page that looks like a file exists."""
    text = PAGES["dpo_score/README.md"]
    package = PROJECT / "dpo_score"
    places = (
        package,
        PROJECT,
        package / "engine",
        package / "results",
        package / "models",
        package / "storage",
        package / "data",
    )
    named = re.findall(r"`((?:\w+/)+\w*(?:\.\w+)?)`", text)
    assert [name for name in named if not any((place / name).exists() for place in places)] == []
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in text} == set()
    assert len(text.splitlines()) <= 100


def test_every_extra_that_a_page_names_is_one() -> None:
    known = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        name
        for page in PAGES.values()
        for extra in re.findall(r"dpo-score\[([\w,]+)\]", page)
        for name in extra.split(",")
    }
    assert {"vision", "quickstart", "ray"} <= named <= known.keys()


def test_the_page_of_the_tests_names_what_is_there() -> None:
    folder = PROJECT / "tests"
    text = (folder / "README.md").read_text()
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)`", text)
    assert len(named) > 30
    assert [name for name in named if not (folder / name).exists()] == []
    modules = re.findall(r"python -m (tests[\w.]+)", text)
    assert [module for module in modules if not (PROJECT / f"{module.replace('.', '/')}.py").exists()] == []
