"""An OUT from somebody else: what its run was allowed is not allowed to those who read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from dpo_score.cli.main import main
from tests.run_fixtures import preference_rows, write_rows

READERS = (["report"], ["audit"], ["inspect"], ["verify"], ["verify", "--against=trl"], ["compare"], ["finish"])
TOUCH = "from pathlib import Path\nPath({canary!r}).touch()\n"
LOSS = TOUCH + "def mine(columns, beta):\n    return -columns['policy_chosen_logps']\n"
TOKENIZER = TOUCH + "class Anything: pass\n"

Command = Callable[..., str]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the real command line; everything it printed."""

    def call(*arguments: object) -> str:
        with suppress(SystemExit):
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out + captured.err

    return call


@pytest.fixture
def shared_out(tmp_path: Path, models: Mapping[str, Path], cache: Path, canary: Path, command: Command) -> Path:
    """OUT of one share whose losses are the user's own code, on models of this test alone. The code has run, once."""
    here = {name: shutil.copytree(models[name], tmp_path / name) for name in ("reference", "better")}
    (tmp_path / "own.py").write_text(LOSS.format(canary=str(canary)))
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(4))
    asked = [f"--data={data}", f"--reference={here['reference']}", f"--policy=better={here['better']}", "--path=plain"]
    asked += [f"--loss={tmp_path / 'own.py'}:mine", f"--out={tmp_path / 'out'}", f"--cache-dir={cache}", "--threads=1"]
    command("run", *asked, "--blocks=0/1")
    assert list((tmp_path / "out" / "scores" / "better").glob("*.parquet"))
    assert canary.exists(), "the loss has not been run"
    canary.unlink()
    return tmp_path / "out"


def trusting(out: Path, canary: Path) -> None:
    """What somebody else may send: a pipeline that trusts, and a tokenizer that is code."""
    pipeline = yaml.safe_load((out / "pipeline.yaml").read_text())
    (out / "pipeline.yaml").write_text(yaml.safe_dump({**pipeline, "trust_remote_code": True, "allow_pickle": True}))
    folder = out.parent / "reference"
    (folder / "payload.py").write_text(TOKENIZER.format(canary=str(canary)))
    path = folder / "tokenizer_config.json"
    named = {"AutoTokenizer": ["payload.Anything", "payload.Anything"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": named}))


@pytest.mark.parametrize("arguments", READERS, ids=" ".join)
def test_reading_runs_no_code(shared_out: Path, canary: Path, command: Command, arguments: list[str]) -> None:
    command("finish", shared_out)
    trusting(shared_out, canary)
    name, *options = arguments
    command(name, shared_out, *options)
    assert not canary.exists()


def test_finish_runs_the_code_of_a_tokenizer_only_where_it_is_told_to(
    shared_out: Path, canary: Path, command: Command
) -> None:
    trusting(shared_out, canary)
    said = command("finish", shared_out)
    assert "--trust-remote-code" in said
    assert not canary.exists()
    command("finish", shared_out, "--trust-remote-code")
    assert canary.exists()


def test_finish_runs_no_loss(shared_out: Path, canary: Path, command: Command) -> None:
    said = command("finish", shared_out)
    assert (shared_out / "summary.json").exists(), said
    assert not canary.exists()
