"""The program beside the data: the same checks with trl and datasets alone, in one process and in two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from tests.exported import export, text_rows, write_rows
from tests.tiny import save_tiny

TRAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig
from load_ref_logps import DPOTrainerWithRefLogps, load

model, work, max_length = sys.argv[1:]
args = DPOConfig(
    work, bf16=False, use_cpu=True, max_length=None if max_length == "None" else int(max_length), max_steps=2,
    per_device_train_batch_size=2, logging_steps=1, report_to="none", save_strategy="no", gradient_checkpointing=False,
)
trainer = DPOTrainerWithRefLogps(
    AutoModelForCausalLM.from_pretrained(model), args=args, train_dataset=load(cache_dir=work + "/hf")["train"],
    processing_class=AutoTokenizer.from_pretrained(model),
)
trainer.train()
assert "dpo_score" not in sys.modules
if trainer.accelerator.is_main_process:
    print("WORLD", trainer.accelerator.num_processes, "FIRST", trainer.state.log_history[0]["rewards/margins"])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "m0", seed=0)


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    rows = text_rows(9)
    rows[0]["chosen"] = None
    export(write_rows(folder / "d.parquet", rows), model, folder / "out")
    (folder / "out/train.py").write_text(TRAIN)
    return folder / "out"


def train(launcher: list[str], exported: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Away from the project, whose package is not on the path."""
    found = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | found
    command = [sys.executable, *launcher, "train.py", *arguments]
    return subprocess.run(command, cwd=exported, env=environment, capture_output=True, text=True, check=False)


def test_it_trains_without_this_package(exported: Path, model: Path, tmp_path: Path) -> None:
    done = train([], exported, str(model), str(tmp_path), "None")
    assert done.returncode == 0, done.stderr[-2000:]
    assert abs(first_margin(done.stdout)) <= 1e-5


def test_it_refuses_in_words(exported: Path, model: Path, tmp_path: Path) -> None:
    done = train([], exported, str(model), str(tmp_path), "40")
    assert done.returncode != 0
    assert "max_length was 1024, here it is 40" in done.stderr


@pytest.mark.slow
def test_two_processes(exported: Path, model: Path, tmp_path: Path) -> None:
    """`--multi_gpu` means one process a device; use_cpu in the trainer makes them talk by gloo."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    done = train(launcher, exported, str(model), str(tmp_path), "None")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WORLD 2 " in done.stdout
    assert abs(first_margin(done.stdout)) <= 1e-5
    assert done.stderr.count("1 of 9 rows have no reference log-probs") == 1


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def first_margin(printed: str) -> float:
    return float(printed.split("FIRST")[1].split()[0])
