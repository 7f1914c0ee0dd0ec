"""A world that does not hold still: inputs that vanish or change, checkpoints half written, odd places for results."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_score.cli.main import main
from dpo_score.engine import run as local
from dpo_score.errors import DpoScoreError, PolicyFailedError, UsageError
from dpo_score.results.rescore import rescore
from dpo_score.results.status import status
from dpo_score.results.verify.verify import verify
from dpo_score.storage.open import open_store
from dpo_score.tokenization import chat_template as template
from tests.run_fixtures import Runner, preference_rows, write_rows
from tests.tiny import save_tiny

ROWS = 130
DATED = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.parquet", preference_rows(ROWS))


def tables(out: Path) -> dict[str, bytes]:
    found = [path for name in ("scores", "reference", "rejects") for path in sorted((out / name).rglob("*.parquet"))]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def at_block(monkeypatch: pytest.MonkeyPatch, number: int, act: Any) -> None:
    """Do something just before block `number` of the reference is computed."""
    real = local.reference_block

    def block(job: Any, reference: Any, text: Any, values: Any) -> Any:
        if text.block == number:
            act()
        return real(job, reference, text, values)

    monkeypatch.setattr(local, "reference_block", block)


def test_an_input_that_vanished_between_runs_is_named_and_its_return_resumes(
    runner: Runner, data: Path, tmp_path: Path, forwards: list[int]
) -> None:
    runner(data, tmp_path / "out", limit=64)
    before = tables(tmp_path / "out")
    data.rename(tmp_path / "away")
    with pytest.raises(UsageError, match=r"pairs\.parquet does not exist"):
        runner(data, tmp_path / "out")
    assert tables(tmp_path / "out") == before
    (tmp_path / "away").rename(data)
    forwards.clear()
    runner(data, tmp_path / "out")
    assert sum(forwards) == 4 * (ROWS - 64), "what was committed is not computed again"


@pytest.mark.parametrize("how", ["changes", "vanishes"])
def test_an_input_that_does_not_stay_during_the_run_commits_nothing_more(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    content = data.read_bytes()

    def spoil() -> None:
        data.unlink()
        if how == "changes":
            write_rows(data, preference_rows(ROWS, seed=5))

    with monkeypatch.context() as patch:
        at_block(patch, 1, spoil)
        with pytest.raises(DpoScoreError, match=r"pairs\.parquet"):
            runner(data, tmp_path / "out")
    found = status(str(tmp_path / "out"))
    assert found["state"] == "running"
    assert found["stages"][0]["done"] <= 1
    data.write_bytes(content)
    runner(data, tmp_path / "out")
    runner(data, tmp_path / "whole")
    assert tables(tmp_path / "out") == tables(tmp_path / "whole")


def test_a_second_run_on_one_folder_names_the_first(
    runner: Runner, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [f"--reference={runner.models['reference']}", f"--policy=better={runner.models['better']}"]
    with open_store(tmp_path / "out").lock(), pytest.raises(SystemExit) as stop:
        main(["run", f"--data={data}", f"--out={tmp_path / 'out'}", f"--cache-dir={runner.cache}", *models])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"pid {os.getpid()}" in said
    assert socket.gethostname() in said
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_scored_policy_whose_folder_is_gone_is_still_reported(
    runner: Runner, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = Path(shutil.copytree(runner.models["better"], tmp_path / "gone"))
    policies = [f"gone={gone}", f"worse={runner.models['worse']}"]
    out = tmp_path / "out"
    first = runner(data, out, policy=policies)
    shutil.rmtree(gone)
    again = runner(data, out, policy=policies)
    assert again.failures == {}
    assert again.summary == first.summary
    assert {stage["stage"] for stage in status(str(out))["stages"]} >= {"scores/gone"}
    assert {row["policy"] for row in rescore(str(out), "ipo", "0.5", None, [], None)["rows"]} == {"gone", "worse"}
    assert verify(str(out)).damage == []
    (out / "report.html").unlink(missing_ok=True)
    with suppress(SystemExit):
        main(["report", str(out)])
    assert "gone" in (out / "report.html").read_text()
    assert "Traceback" not in capsys.readouterr().err


def half(folder: Path, how: str) -> None:
    """As a writer leaves it that has not finished, or died."""
    weights = folder / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "header":
        weights.write_bytes(weights.read_bytes()[:20])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "absent":
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config cut":
        (folder / "config.json").write_text('{"model_type": "lla')
    else:
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        weights.rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("how", ["cut", "header", "empty", "absent", "no config", "config cut", "shard"])
def test_a_half_written_checkpoint_fails_alone_and_is_scored_once_it_is_whole(
    runner: Runner, tmp_path: Path, how: str
) -> None:
    data = write_rows(tmp_path / "few.parquet", preference_rows(6))
    folder = Path(shutil.copytree(runner.models["worse"], tmp_path / "step-20"))
    half(folder, how)
    policies = [f"step-10={runner.models['better']}", f"step-20={folder}"]
    found = runner(data, tmp_path / "out", policy=policies)
    assert list(found.summary["policies"]) == ["step-10"]
    with pytest.raises(PolicyFailedError, match=r"step-20: .*step-20"):
        found.raise_failures()
    shutil.rmtree(folder)
    shutil.copytree(runner.models["worse"], folder)
    assert sorted(runner(data, tmp_path / "out", policy=policies).summary["policies"]) == ["step-10", "step-20"]


def test_weights_that_change_during_the_run_are_not_stored(
    runner: Runner, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(runner.models["better"], tmp_path / "training"))

    def train() -> None:
        save_tiny(folder, seed=77)

    at_block(monkeypatch, 0, train)
    found = runner(data, tmp_path / "out", policy=[f"training={folder}"])
    assert "changed" in found.failures["training"]
    assert not list((tmp_path / "out").glob("scores/training/*.parquet"))


@pytest.mark.parametrize("name", ["a folder with spaces", "Ergebnisse-日本-é", "x" * 200, "-dash", "%41#?&"])
def test_results_may_stand_anywhere(runner: Runner, tmp_path: Path, name: str) -> None:
    data = write_rows(tmp_path / "few.parquet", preference_rows(6))
    out = tmp_path / name / "out"
    runner(data, out)
    runner(data, out)
    runner(data, tmp_path / "plain")
    assert tables(out) == tables(tmp_path / "plain")
    assert verify(str(out)).damage == []
    assert pl.scan_parquet(f"{out}/scores/better/*.parquet", glob=True).collect().height == 6


def test_results_may_stand_behind_a_link(runner: Runner, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.parquet", preference_rows(6))
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    runner(data, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert verify(str(tmp_path / "disk")).damage == []
    runner(data, tmp_path / "disk")


def test_a_private_umask_is_kept(runner: Runner, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.parquet", preference_rows(6))
    before = os.umask(0o077)
    try:
        runner(data, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o077 for top in (tmp_path / "out", runner.cache) for path in top.rglob("*")}
    assert modes == {0}


def chat_rows(count: int) -> list[dict[str, Any]]:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return [
        {"prompt": turn("user", f"q{i}"), "chosen": turn("assistant", "yes"), "rejected": turn("assistant", "no")}
        for i in range(count)
    ]


def test_midnight_passes_without_a_trace(
    runner: Runner, tmp_path: Path, models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "chat.parquet", chat_rows(70))

    class Clock(datetime.date):
        now = datetime.date(2026, 12, 31)

        @classmethod
        def today(cls) -> Any:
            return cls.now

    monkeypatch.setattr(template.datetime, "date", Clock)
    runner(data, tmp_path / "out", limit=64, chat_template=DATED)
    Clock.now = datetime.datetime(2027, 1, 1).date()
    runner(data, tmp_path / "out", chat_template=DATED)
    runner(data, tmp_path / "said", chat_template=DATED, date="2026-12-31")
    runner(data, tmp_path / "today", chat_template=DATED)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["notes"]["date"] == "2026-12-31"
    assert tables(tmp_path / "out") == tables(tmp_path / "said")
    assert tables(tmp_path / "out") != tables(tmp_path / "today")
