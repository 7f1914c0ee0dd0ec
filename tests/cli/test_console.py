"""What a person sees on terminals of many kinds: 80 columns, a pipe, no colours, no UTF-8; names are whole words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dpo_score
from dpo_score.cli.console import _best, broken_name
from dpo_score.cli.main import main
from tests.engine.whole_runs.small_run import small_run
from tests.exported import text_rows, write_rows
from tests.tiny import save_tiny

LONG = "Qwen2.5-7B-instruct-dpo-beta0.05-lr5e-7_checkpoint"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six policies with long names on two data sets."""
    folder = tmp_path_factory.mktemp("sweep")
    for seed in (0, 1):
        save_tiny(folder / f"m{seed}", seed=seed)
    data = {name: write_rows(folder / f"{name}.parquet", text_rows(12, seed)) for seed, name in enumerate(("hh", "uf"))}
    policies = {f"{LONG}-{step}": folder / f"m{step % 2}" for step in (100, 201, 300, 401, 500, 601)}
    options: dict[str, Any] = {"path": "plain", "cache_dir": folder / "c", "threads": 1}
    dpo_score.run(data=data, reference=folder / "m0", policy=policies, out=folder / "out", **options)
    return folder / "out"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    found = capsys.readouterr()
    assert stop.value.code == code, found.err
    return found.out + found.err


@pytest.mark.parametrize("command", ["compare", "rescore", "status"])
def test_tables_fit_80_columns_and_names_are_whole_words(
    command: str, sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, command, str(sweep))
    tables = [line for line in text.splitlines() if "dpo-score" not in line and str(sweep) not in line]
    assert max(map(len, tables)) <= 80
    for word in ("Qwen2.", "instruct-", "checkpoint-"):
        assert word in text
    if command == "compare":
        assert "left out on 80 columns: nats" in text
        assert "* highest accuracy" in text


def test_a_pipe_has_every_column(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    text = shown(capsys, "compare", str(sweep))
    assert "left out on" not in text
    assert f"{LONG}-100" in text


def test_data_sets_are_compared_each_by_itself(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "compare", str(sweep), "--policies", f"{LONG}-100,{LONG}-201")
    assert "24 pairs in common" in text
    assert "by dataset (each by itself" in text
    assert "by data" in shown(capsys, "compare", str(sweep), "--slice", "data")


def test_a_slice_that_is_nowhere_lists_what_there_is(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "compare", str(sweep), "--slice", "languge", code=2)
    assert "built in: data, length, turns" in text
    assert "n, prompt" in text
    assert "_logps" not in text


def test_the_gate_of_the_readme_needs_no_baseline_and_says_which_it_took(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = f"{LONG}-201,{LONG}-401"
    text = shown(capsys, "compare", str(sweep), "--policies", both, "--fail-if", "diff.accuracy.high < 0")
    assert " ".join(text.split()).count("the first policy; name another with --baseline") == 1
    assert f"the baseline is {LONG}-201" in " ".join(text.split())


def test_a_policy_that_ties_on_most_pairs_has_no_star() -> None:
    def cell(right: float, ranked: int, labelled: int = 0) -> dict[str, Any]:
        accuracy = {"value": right, "n": ranked}
        return {"overall": {"accuracy": accuracy, "scored": 300, "labelled_ties": labelled}}

    assert _best({"early": cell(1.0, 3), "mid": cell(0.6, 300), "late": cell(0.9, 290)}) == "late"
    assert _best({"a": cell(0.8, 100, 200), "b": cell(0.7, 100, 200)}) == "a"
    assert _best({"a": cell(0.8, 300), "b": cell(0.8, 300)}) is None


def test_a_finding_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "compare", str(small_run().out), "--fail-if", "accuracy < 1.01", code=5)
    assert text.count("--fail-if holds") == 1
    assert text.count("fail-if") == 1


def test_the_last_line_names_only_files_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_score.cli.console import outcome
    from dpo_score.engine.finish import Outcome

    policies: dict[str, Any] = {"policies": {}, "skipped": {}}
    outcome(Outcome(str(tmp_path), policies))
    assert "report.html" not in capsys.readouterr().out
    (tmp_path / "report.html").write_text("")
    outcome(Outcome(str(tmp_path), policies))
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_utf8_is_no_traceback(encoding: str, sweep: Path) -> None:
    environment = {"PYTHONIOENCODING": encoding, "PATH": "/usr/bin", "COLUMNS": "90", "PYTHONPATH": str(Path.cwd())}
    for arguments in (["compare", str(sweep)], ["run", "--help"], ["inspect", str(small_run().out), "--row", "3"]):
        done = subprocess.run(
            [sys.executable, "-m", "dpo_score", *arguments], env=environment, capture_output=True, check=False
        )
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr[-500:]
        done.stdout.decode(encoding)


def test_no_color_means_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from dpo_score.cli.console import is_plain

    assert is_plain(Console(force_terminal=True, color_system="truecolor", no_color=True))
    assert not is_plain(Console(force_terminal=True, color_system="truecolor", no_color=False))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("short", "short"),
        ("beta-0.05-checkpoint-500", "beta-0.05-checkpoint-500"),
        ("dpo-with-a-long-name-checkpoint-500", "dpo-with-a-long-name-\ncheckpoint-500"),
        ("onewordthatismuchlongerthanthewidth", "onewordthatismuchlongerthanthewidth"),
    ],
)
def test_names_break_after_a_separator(name: str, lines: str) -> None:
    assert broken_name(name) == lines
    assert broken_name(name).replace("\n", "") == name
