"""A model whose files change under a run: that policy ends with one sentence, and nothing of it is kept anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dpo_score.engine import prepare as preparing
from dpo_score.engine import run as running
from dpo_score.errors import PolicyFailedError
from tests.models.model_folders import edit
from tests.run_fixtures import Runner, preference_rows, write_rows

VALUES = ["policy_chosen_logps", "policy_rejected_logps"]


def scores(out: Path, policy: str = "a") -> list[dict[str, Any]]:
    return pq.read_table(out / "scores" / policy, columns=["row_id", *VALUES]).to_pylist()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.parquet", preference_rows(60))


@pytest.fixture
def live(runner: Runner, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runner.models["better"], tmp_path / "live"))


def truth(runner: Runner, data: Path, model: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """The scores of a model from an empty cache."""
    fresh = Runner(tmp_path / f"cache of {model.name}", runner.models)
    fresh(data, tmp_path / f"truth of {model.name}", policy=[f"a={model}"]).raise_failures()
    return scores(tmp_path / f"truth of {model.name}")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_newer_checkpoint_copied_over_the_one_that_is_scored(
    name: str, runner: Runner, data: Path, live: Path, tmp_path: Path
) -> None:
    """The real command, and `cp` of one file in the moment at which it says that it loads the policy."""
    out, other = tmp_path / "out", Path(shutil.copytree(runner.models["worse"], tmp_path / "other"))
    edit(other / "config.json", rms_norm_eps=0.5)
    command = [sys.executable, "-m", "dpo_score", "run", f"--data={data}", f"--policy=a={live}", f"--out={out}"]
    command += [f"--reference={runner.models['reference']}", f"--cache-dir={runner.cache}", "--threads=1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if f"loading {live}" in line:
                shutil.copyfile(other / name, live / name)
    text = " ".join("".join(said).split())
    assert process.returncode == 6, text
    assert f"{name} changed or vanished after this run began" in text
    assert not list((out / "scores").glob("a/*"))
    assert not list((out / "commits" / "scores").glob("a/*"))

    genuine = runner.models["better"]
    runner(data, tmp_path / "genuine", policy=[f"a={genuine}"]).raise_failures()
    assert scores(tmp_path / "genuine") == truth(runner, data, genuine, tmp_path)
    runner(data, out, policy=[f"a={live}"]).raise_failures()
    assert scores(out) == truth(runner, data, live, tmp_path)


def test_a_change_between_two_blocks_takes_the_policy_out_again(
    runner: Runner, data: Path, live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "block_rows", lambda *_: 24)
    real, out = running.commit, tmp_path / "out"

    def commit_then_change(store: Any, record: Any) -> None:
        real(store, record)
        if (record.stage, record.block) == ("scores/a", 0):
            change(live, runner.models["worse"], "config")

    monkeypatch.setattr(running, "commit", commit_then_change)
    policies = [f"a={live}", f"b={runner.models['worse']}"]
    found = runner(data, out, policy=policies)
    with pytest.raises(PolicyFailedError, match=r"a: .*changed or vanished"):
        found.raise_failures()
    assert list(found.summary["policies"]) == ["b"]
    assert not list((out / "scores").glob("a/*"))
    monkeypatch.undo()

    runner(data, tmp_path / "genuine", policy=[f"a={runner.models['better']}"]).raise_failures()
    assert scores(tmp_path / "genuine") == truth(runner, data, runner.models["better"], tmp_path)
    runner(data, out, policy=policies).raise_failures()
    assert len(scores(out)) == 60


def change(live: Path, other: Path, what: str) -> None:
    """Other content in the same file, with its old time of change put back."""
    path = live / ("model.safetensors" if what == "weights" else "config.json")
    before = path.stat()
    if what == "weights":
        shutil.copyfile(other / "model.safetensors", path)
    else:
        edit(path, rms_norm_eps=0.5)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_values_of_other_versions_are_computed_again(
    runner: Runner, tmp_path: Path, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_score.engine import model_logprobs

    data = write_rows(tmp_path / "few.parquet", preference_rows(4))
    runner(data, tmp_path / "one").raise_failures()
    first = len(forwards)
    runner(data, tmp_path / "two").raise_failures()
    assert len(forwards) == first
    real = model_logprobs.versions
    monkeypatch.setattr(model_logprobs, "versions", lambda numerics: {**real(numerics), "torch": "0.0"})
    runner(data, tmp_path / "three").raise_failures()
    assert len(forwards) == 2 * first
    spaces = [json.loads(path.read_text()) for path in runner.cache.glob("logps/v1/*/namespace.json")]
    assert {space["libraries"]["torch"] for space in spaces} == {real(None)["torch"], "0.0"}
