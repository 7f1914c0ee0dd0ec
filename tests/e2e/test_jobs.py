"""Four kinds of users, each from the first command to the answer: with TRL, at a gate, with a benchmark, in Python."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import dpo_score
from dpo_score.cli.main import main
from tests.e2e.notebook import executed
from tests.e2e.readme import PROJECT
from tests.exported import text_rows, write_rows
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("sft", "checkpoint-9", "checkpoint-10")):
        save_tiny(folder / name, seed=seed)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_SCORE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DPO_SCORE_THREADS", "1")


def command(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    found = capsys.readouterr()
    assert stop.value.code == code, found.err
    return found.out


def test_training_with_trl_by_the_line_that_precompute_prints(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`trl dpo` with its own --config, on the data that were written, without this package on the path."""
    pytest.importorskip("trl")
    data = write_rows(tmp_path / "prefs.parquet", text_rows(8))
    shown = command(capsys, "precompute", "--data", data, "--reference", models / "sft", "--out", tmp_path / "out")
    line = next(line for line in shown.splitlines() if line.startswith("train: "))
    words = shlex.split(line.removeprefix("train: ").partition(" (")[0])
    told = {"python": sys.executable, "MODEL": str(models / "sft"), "DIR": str(tmp_path / "trained")}
    settings = {
        "max_steps": 5, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": "none",
        "dtype": "float32", "gradient_checkpointing": False, "save_strategy": "no",
    }  # fmt: skip
    (tmp_path / "dpo.yaml").write_text(json.dumps(settings))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*(told.get(word, word) for word in words), "--config", str(tmp_path / "dpo.yaml")],
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "hf")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "trained/model.safetensors").is_file()


def test_choosing_a_checkpoint_and_gating_it(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_rows(tmp_path / "prefs.parquet", text_rows(40)), tmp_path / "out"
    options = ("--data", data, "--reference", models / "sft", "--policy", f"step={models}/checkpoint-*", "--out", out)
    shown = command(capsys, "run", *options)
    assert shown.index("step-9") < shown.index("step-10")
    assert f"results in {out}: scores/<policy>/*.parquet, summary.json, report.html" in shown
    assert "policy" in command(capsys, "compare", out, "--policies", "all")
    command(capsys, "compare", out, "--fail-if", "diff.accuracy.high < 0")
    command(capsys, "compare", out, "--fail-if", "accuracy < 1.01", code=5)
    assert "report.html" in command(capsys, "report", out)


def test_a_messy_benchmark_file(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows with a hole, an empty answer or the wrong type are rejected with a code; the rest is the benchmark's."""
    subsets = ("alpacaeval-easy", "mt-bench-hard", "refusals-dangerous", "math-prm")
    rows: list[dict[str, Any]] = [dict(row, subset=subsets[i % 4]) for i, row in enumerate(text_rows(12))]
    rows[3]["chosen"], rows[5]["rejected"], rows[7]["prompt"] = None, "", 5
    (tmp_path / "bench.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    out = tmp_path / "out"
    options = ("--data", tmp_path / "bench.jsonl", "--reference", models / "sft", "--rewardbench", "corrected")
    shown = command(capsys, "run", *options, "--policy", f"dpo={models}/checkpoint-10", "--out", out)
    assert "RewardBench, corrected" in shown
    assert "not scored" in shown
    written = command(capsys, "export", out, "--to", "rewardbench").split()
    found = json.loads(Path(next(name for name in written if "eval-set-scores" in name)).read_text())
    rejected = pl.read_parquet(out / "rejects/data/*.parquet")
    assert len(found["id"]) + rejected.height == len(rows)
    assert set(rejected["source_row"]) >= {3, 7}


def test_in_python_with_polars(models: Path, tmp_path: Path) -> None:
    frame = pl.DataFrame(text_rows(6))
    names = {step: models / f"checkpoint-{step}" for step in ("9", "10")}
    scores = dpo_score.score(frame, policy=names["9"], reference=models / "sft")
    result = dpo_score.run(data=frame, policy=names, reference=models / "sft", out=tmp_path / "out")
    assert result.scores("9")["margins"].to_list() == pytest.approx(scores["margins"].to_list(), abs=1e-4)
    assert "<table>" in result._repr_html_()


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    reference = save_tiny(tmp_path / "model")
    for step in ("step-10", "step-76"):
        adapter = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(reference), adapter).save_pretrained(tmp_path / step)
    for name, value in {"REFERENCE": reference, "ADAPTERS": tmp_path, "OUT": tmp_path / "out"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(PROJECT)
    notebook = PROJECT / "pipelines/score_in_python.ipynb"
    cells = [cell for cell in executed(notebook)["cells"] if cell["cell_type"] == "code"]
    shown = [cell["outputs"][-1]["data"] for cell in cells[1:]]
    assert "null_field" in shown[0]["text/plain"]
    assert "RunResult(" in shown[1]["text/plain"]
    assert "<iframe sandbox" in shown[1]["text/html"]
    kept = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in kept)


def test_the_wheel_brings_the_quickstart_and_says_its_version(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{PROJECT}", str(source)], check=True)
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "installed")
    program = (
        "from dpo_score.cli.run import quickstart_folder as q; f = q(); "
        "print(sorted(p.name for p in f.iterdir()), sorted(p.name for p in (f / 'quickstart-adapters').iterdir()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("]")[0] == "['quickstart-adapters', 'quickstart-test.parquet'"
    assert "'step-10', 'step-38', 'step-76'" in done.stdout
    for flag in ("--version", "-V"):
        version = [sys.executable, "-m", "dpo_score", flag]
        done = subprocess.run(version, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"dpo-score {dpo_score.__version__}\n"


def test_the_container_file_names_what_is_there() -> None:
    text = (PROJECT / "pipelines/Dockerfile").read_text()
    for name in ("constraints.txt", "torch-cpu.txt"):
        assert name in text
        assert (PROJECT / name).is_file()
    assert 'ENTRYPOINT ["dpo-score"]' in text
    assert "pipelines/Dockerfile" in (PROJECT / "pipelines/kubernetes_job.yaml").read_text()
