"""The doctor on a machine without a GPU, and its CUDA half on a GPU that is pretended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_score.cli.main import main
from dpo_score.engine import doctor
from dpo_score.engine.doctor import Status, cuda_devices, cuda_settings, examine, no_cuda
from dpo_score.logprobs import compilation
from tests.tiny import save_tiny


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Programs that would run in a process of their own, instead of running them; all of them end well."""
    programs: list[str] = []

    def run(program: str, seconds: float) -> None:
        programs.append(program)

    monkeypatch.setattr(doctor, "run_apart", run)
    monkeypatch.setattr(compilation, "run_apart", run)
    monkeypatch.setattr(compilation, "_found", {})
    return programs


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_every_check_of_a_machine_without_a_gpu(quick: list[str], tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    found = {finding.what: finding for finding in examine(str(model), cache_dir=str(tmp_path / "cache"))}
    assert {"software", "processor", "threads", "memory", "cache", "products", "compilation", "model"} <= set(found)
    assert f"torch {torch.__version__}" in found["software"].seen
    assert "float32 on cpu, fast path" in found["model"].seen
    assert found["compilation"].status is Status.OK
    assert "torch.compile" in quick[0]
    assert "pairs a second" in found["its tokenizer"].seen
    assert not (tmp_path / "cache/logps").exists()


@pytest.mark.parametrize(
    ("program", "said"), [("raise ValueError('no compiler')", "no compiler"), ("import os; os._exit(3)", "3")]
)
def test_a_process_that_fails_is_a_finding(program: str, said: str) -> None:
    assert said in str(compilation.run_apart(program, 30.0))


def test_a_process_that_hangs_is_a_finding() -> None:
    assert compilation.run_apart("import time; time.sleep(60)", 0.5) == "no answer within 0 s"


def test_a_model_that_cannot_be_read_is_a_problem_and_exit_1(
    quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^1$"):
        main(["doctor", "--reference", str(tmp_path / "nothing"), "--cache-dir", str(tmp_path), "--json"])
    problems = [f for f in json.loads(capsys.readouterr().out) if f["status"] == "problem"]
    assert [finding["what"] for finding in problems] == ["model"]
    assert "no such model" in problems[0]["seen"]


def test_a_cpu_build_beside_a_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = no_cuda()
    assert finding.status is Status.PROBLEM
    assert "CUDA build" in finding.way_out


def pretended_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], free: int) -> None:
    answers: dict[str, Any] = {
        "get_device_capability": capability,
        "mem_get_info": (free, 100),
        "get_device_name": "Pretended",
        "device_count": 1,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)


def test_settings_that_make_a_gpu_inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended_gpu(monkeypatch, (7, 0), 10)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert [(f.what, f.status) for f in cuda_settings()] == [("TF32", Status.PROBLEM), ("bfloat16", Status.NOTE)]
    first, *_ = cuda_devices()
    assert "capability 7.0" in first.seen
    assert "--device cuda:N" in first.way_out


def test_settings_of_a_gpu_that_is_as_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended_gpu(monkeypatch, (9, 0), 90)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert list(cuda_settings()) == []
