"""`run --watch`: checkpoints are scored as they come, a half-written one when it is whole, until a step or a signal."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_score.cli.main import main
from dpo_score.config.schema import RunConfig
from dpo_score.engine import watch as watching
from dpo_score.engine.finish import Outcome
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError
from tests.run_fixtures import Runner, preference_rows, write_rows


@pytest.fixture
def training(tmp_path: Path) -> Path:
    folder = tmp_path / "training"
    folder.mkdir()
    return folder


@pytest.fixture
def configured(runner: Runner, training: Path, tmp_path: Path) -> Callable[[], RunConfig]:
    data = write_rows(tmp_path / "few.parquet", preference_rows(6))
    return lambda: runner.config(data, tmp_path / "out", policy=[f"dpo={training}/checkpoint-*"])


def test_each_checkpoint_is_scored_when_it_is_whole_and_the_step_ends_it(
    configured: Callable[[], RunConfig], runner: Runner, training: Path
) -> None:
    """The first look finds nothing, the second one whole and one half written, the third the rest."""
    seen: list[tuple[list[str], list[str]]] = []
    looks = 0

    def look() -> RunConfig:
        nonlocal looks
        looks += 1
        if looks == 2:
            shutil.copytree(runner.models["better"], training / "checkpoint-10")
            shutil.copytree(runner.models["worse"], training / "checkpoint-20")
            (training / "checkpoint-20/model.safetensors").unlink()
        if looks == 4:
            shutil.copy(runner.models["worse"] / "model.safetensors", training / "checkpoint-20")
        return configured()

    def finished(outcome: Outcome) -> None:
        seen.append((list(outcome.summary["policies"]), list(outcome.summary["skipped"])))

    outcome = watching.watch(look, Progress(quiet=True), 0.01, until=20, finished=finished)
    assert outcome is not None
    assert seen == [(["dpo-10"], ["dpo-20"]), (["dpo-10", "dpo-20"], [])]
    assert looks == 4, "nothing had changed at the third look"


def test_a_signal_ends_the_wait(configured: Callable[[], RunConfig], runner: Runner, training: Path) -> None:
    shutil.copytree(runner.models["better"], training / "checkpoint-10")

    def finished(_: Outcome) -> None:
        def interrupt() -> None:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()

    outcome = watching.watch(configured, Progress(quiet=True), 60.0, finished=finished)
    assert outcome is not None
    assert list(outcome.summary["policies"]) == ["dpo-10"]


def test_what_cannot_be_watched_is_refused(runner: Runner, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.parquet", preference_rows(6))
    with pytest.raises(ConfigError, match="by a glob"):
        watching.watch(lambda: runner.config(data, tmp_path / "out"), Progress(quiet=True), 1.0)
    with pytest.raises(ConfigError, match="above 0"):
        watching.watch(lambda: runner.config(data, tmp_path / "out"), Progress(quiet=True), 0.0)


def test_the_command(runner: Runner, training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runner.models["better"], training / "checkpoint-10")
    data = write_rows(tmp_path / "few.parquet", preference_rows(6))
    out = tmp_path / "out"
    command = ["run", f"--data={data}", f"--reference={runner.models['reference']}", f"--out={out}", "--quiet"]
    with pytest.raises(SystemExit) as ended:
        main([*command, f"--cache-dir={runner.cache}", f"--policy=dpo={training}/*-*", "--watch=1", "--until=10"])
    assert ended.value.code == 0
    assert "dpo-10" in capsys.readouterr().out
    assert (out / "report.html").is_file()
