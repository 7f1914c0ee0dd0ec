"""Which engine a run goes to, and that the cluster examples hold what they say."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_score.config.load import load_config
from dpo_score.config.schema import RunConfig
from dpo_score.engine.executors import choose as engines
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError

PIPELINES = Path(__file__).parents[3] / "pipelines"


class Heard(Progress):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def config(**options: Any) -> RunConfig:
    return load_config(None, {"data": ["pairs.parquet"], **options}, environment={})


@pytest.mark.parametrize(
    ("gpus", "ray", "options", "engine"),
    [
        (1, True, {}, "local"),
        (4, True, {}, "ray"),
        (4, False, {}, "local"),
        (4, True, {"engine": "local"}, "local"),
        (4, True, {"device": "cpu"}, "local"),
        (4, True, {"device": "cuda:1"}, "local"),
        (4, True, {"device_map": "auto"}, "local"),
        (4, True, {"blocks": "0/4"}, "local"),
        (4, True, {"tensor_parallel": 2}, "ray"),
        (4, False, {"tensor_parallel": 2}, "local"),
        (2, True, {"tensor_parallel": 2}, "local"),
        (0, True, {"workers": 2}, "ray"),
        (4, True, {"workers": 1}, "local"),
        (0, True, {"ray_address": "auto"}, "ray"),
        (0, False, {"engine": "ray"}, "ray"),
    ],
)
def test_several_gpus_and_ray_make_ray_the_default(
    gpus: int, ray: bool, options: dict[str, Any], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_gpus", lambda: gpus)
    monkeypatch.setattr(engines, "find_spec", lambda name: object() if ray else None)
    assert engines.choose_executor(config(**options), Heard()).value == engine


@pytest.mark.parametrize(
    ("options", "said"),
    [({"workers": 2}, "pip install 'dpo-score\\[ray\\]'"), ({"workers": 2, "engine": "local"}, "leave one out")],
)
def test_several_workers_need_ray(options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_gpus", lambda: 0)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=said):
        engines.choose_executor(config(**options), Heard())


def test_idle_gpus_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_gpus", lambda: 8)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    heard = Heard()
    engines.choose_executor(config(), heard)
    assert "7 of 8 GPUs stay idle" in heard.lines[0]
    assert "pip install 'dpo-score[ray]'" in heard.lines[0]


def test_the_slurm_example_divides_the_blocks_among_its_tasks() -> None:
    script = PIPELINES / "slurm_array.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "--array=0-7" in text
    assert "SHARES=${SHARES:-8}" in text


def test_the_kubernetes_example_divides_the_blocks_among_its_pods() -> None:
    job = yaml.safe_load((PIPELINES / "kubernetes_job.yaml").read_text())["spec"]
    command = job["template"]["spec"]["containers"][0]["args"][0]
    assert job["completionMode"] == "Indexed"
    assert f'--blocks "$JOB_COMPLETION_INDEX/{job["completions"]}"' in command
