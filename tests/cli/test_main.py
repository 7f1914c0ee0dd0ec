"""The command line: spellings, errors, exit codes, what is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_score.cli.main import COMMANDS, app, defined, main
from dpo_score.config.hints import MEANINGS
from dpo_score.config.schema import FIRST_OPTIONS, OPTIONS

ROOT = Path(__file__).parents[2]


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_help_lists_every_option() -> None:
    shown = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    missing = [option.flag for option in OPTIONS if option.flag not in shown]
    assert missing == []


def test_the_page_of_all_commands_says_of_each_what_its_own_page_says_first() -> None:
    """`dpo-score --help` loads no command, so what it says of them is written a second time."""
    for commands in COMMANDS.values():
        for name, (_, said) in commands.items():
            command = defined(name)
            assert (command.name or "cache", command.help.split("\n\n")[0]) == (name, said)


@pytest.mark.parametrize(
    ("command", "said", "unsaid"),
    [
        (("cache", "verify"), "Nothing is moved", "are set aside and"),
        (("cache", "gc"), "written longer ago", "not used"),
    ],
)
def test_help_says_what_is_done(command: tuple[str, ...], said: str, unsaid: str) -> None:
    """`cache verify` leaves every file where it is, and `gc` asks for the age of files."""
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert (said in shown, unsaid in shown) == (True, False), shown


def test_underscores_and_dashes_are_one_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    for spelling in ("--max_length=-3", "--max-length=-3"):
        code, _, said = run_cli(capsys, "run", "--data", "nowhere.parquet", spelling)
        assert (code, "text.max_length" in said) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "missing.yaml"], 2, "does not exist"),
        (["run", "--data", "a.parquet", "--policy", "p=m"], 2, "no folder for the results"),
        (["status", "no-such-folder"], 2, "holds no run"),
        (["verify", "no-such-folder"], 2, "holds no run"),
        (["rescore", "no-such-folder"], 2, "holds no run"),
        (["cache", "gc"], 2, "removes nothing unasked"),
        (["cache", "gc", "--max-bytes", "-5"], 2, "--max-bytes -5: give a number from 0 on"),
        (["cache", "gc", "--max-age-days", "nan"], 2, "--max-age-days nan: give a number from 0 on"),
    ],
)
def test_a_mistake_ends_with_its_code_and_one_paragraph(
    arguments: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _, error = run_cli(capsys, *arguments)
    assert (found, said in error) == (code, True), error
    assert "Traceback" not in error


def test_untrusted_text_in_an_error_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, error = run_cli(capsys, "run", "\x1b]8;;evil\x07\u202e.yaml")
    assert "\x1b" not in error
    assert "\u202e" not in error


LIGHT = ("--help", "formats", "status OUT", "verify OUT", "rescore OUT", "cache ls")


@pytest.mark.parametrize("command", LIGHT)
def test_commands_without_a_model_import_neither_torch_nor_transformers(command: str, tmp_path: Path) -> None:
    arguments = command.replace("OUT", str(tmp_path)).split()
    program = (
        "import sys; from dpo_score.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = {"DPO_SCORE_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin"}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--model", "--policy NAME=MODEL for a checkpoint to score, --reference MODEL"),
        ("--model_name_or_path", "--policy NAME=MODEL"),
        ("--ref-model", "--reference MODEL"),
        ("--batch-size", "--batch-tokens N"),
        ("--tasks", "--data [NAME=]PATH"),
        ("--output_dir", "--out DIR"),
        ("--num_samples", "--limit N for the first N rows"),
        ("--bta", "did you mean --beta?"),
        ("--precission", "use --dtype float32"),
        ("--lr", "does not train"),
        ("--zzz", "there is no option --zzz\n"),
    ],
)
def test_names_of_other_programs_get_the_right_hint(
    typed: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, error = run_cli(capsys, "run", typed, "x")
    assert (code, said in error) == (2, True), error
    key = typed.lstrip("-").replace("-", "_")
    if key in MEANINGS:
        (tmp_path / "job.yaml").write_text(f"data: x\n{key}: y\n")
        code, _, error = run_cli(capsys, "run", str(tmp_path / "job.yaml"))
        assert (code, said in error) == (2, True), error


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("doctor", "--model", "m"), "--model: use --reference MODEL for the frozen model\n"),
        (("precompute", "--output_dir", "o"), "use --out DIR"),
        (("compare", "o", "--by", "subset"), "use --slice COLUMN"),
        (("select", "o", "--by", "subset"), "did you mean --by-subset?"),
        (("verify", "o", "--model", "m"), "there is no option --model\n"),
    ],
)
def test_a_hint_names_only_what_the_command_has(
    command: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run_cli(capsys, *command)
    assert (code, said in error) == (2, True), error


@pytest.mark.parametrize("typed", ["eval", "runn", "evaluate"])
def test_a_command_that_is_not_there_suggests_one(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run_cli(capsys, typed)
    assert (code, "did you mean `dpo-score run`?" in error) == (2, True), error


def test_the_first_ten_options_come_first_and_defaults_are_shown() -> None:
    shown = CliRunner().invoke(app, ["run", "-h"], env={"COLUMNS": "120", "TERM": "dumb"}).output
    first = shown[shown.index("What most people need first") : shown.index("Of this command")]
    flags = [f"--{name.replace('_', '-')}" for name in (*FIRST_OPTIONS, "dry_run")]
    assert [flag for flag in flags if flag not in first] == []
    assert "(default: sigmoid)" in first


def test_every_word_of_the_hints_leads_to_an_option_there_is() -> None:
    flags = {option.flag for option in OPTIONS} | {"--restart", "--quiet"}
    for here in set(MEANINGS.values()):
        assert {word.rstrip(",;:") for word in here.split() if word.startswith("--")} <= flags, here


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_each_shell_offers_options_and_choices(shell: str) -> None:
    words = {
        "bash": {"COMP_WORDS": "dpo-score run --dtype ", "COMP_CWORD": "3"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "dpo-score run --dtype "},
        "fish": {"_TYPER_COMPLETE_ARGS": "dpo-score run --dtype ", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    environment = {"PATH": "/usr/bin", "_DPO_SCORE_COMPLETE": f"complete_{shell}", **words}
    program = "import sys; from dpo_score.cli.main import main; main([])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False, cwd=ROOT
    )
    assert "bfloat16" in done.stdout, done.stderr[-500:]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "dpo_score", "formats"]
        found = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    said = "error: standard output cannot be written: No space left on device\n"
    assert (found.returncode, found.stderr) == (1, said)


def test_ctrl_c_outside_a_run_is_one_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpo_score.cli.main.app", stopped)
    with pytest.raises(SystemExit) as ended:
        main(["status", "x"])
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")
