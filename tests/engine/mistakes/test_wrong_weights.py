"""Ways by which another model's numbers once came out under a model's name, by the real command, and the genuine model
with the same cache afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from dpo_score.cli.main import main
from tests.engine.mistakes.test_changed_weights import change
from tests.models.model_folders import source
from tests.models.test_gguf import write_tiny_gguf
from tests.run_fixtures import preference_rows, write_rows

Command = Callable[..., tuple[int, str]]
CODE = """from transformers import LlamaConfig, LlamaForCausalLM

class MyConfig(LlamaConfig):
    model_type = "mine"

class Mine(LlamaForCausalLM):
    config_class = MyConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1
        return output
"""


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], cache: Path) -> Command:
    """Runs the real command line; its exit code and everything it printed, on one line."""

    def call(*arguments: object) -> tuple[int, str]:
        code = 0
        try:
            asked = [str(argument) for argument in arguments]
            here = [] if any(argument.startswith("--cache-dir") for argument in asked) else [f"--cache-dir={cache}"]
            main([*asked, *here, *(["--threads=1"] if asked[0] == "run" else [])])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, " ".join((captured.out + captured.err).split())

    return call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "few.parquet", preference_rows(6))


def values(out: Path, policy: str = "a") -> np.ndarray:
    table = pq.read_table(out / "scores" / policy, columns=["policy_chosen_logps", "policy_rejected_logps"])
    return np.stack([column.to_numpy() for column in table.columns])


def scored(command: Command, data: Path, out: Path, model: object, *more: str) -> np.ndarray:
    code, said = command("run", f"--data={data}", f"--policy=a={model}", "--loss=orpo", f"--out={out}", *more)
    assert code == 0, said
    return values(out)


@pytest.mark.slow
def test_weights_changed_in_place_between_two_blocks(
    command: Command, models: Mapping[str, Path], cache: Path, tmp_path: Path
) -> None:
    """`cp` over the weights of a checkpoint that is being scored, their old time put back, when its first block is
    there."""
    rows = preference_rows(200)
    data, out = write_rows(tmp_path / "rows.parquet", rows), tmp_path / "out"
    live = Path(shutil.copytree(models["better"], tmp_path / "live"))
    asked = [f"--data={data}", f"--policy=a={live}", "--loss=orpo", f"--out={out}", f"--cache-dir={cache}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_score", "run", *asked, "--threads=1"], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list((out / "commits" / "scores").glob("a/*")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)  # so that the change falls between two blocks however busy the machine is
    change(live, models["worse"], "weights")
    os.kill(process.pid, signal.SIGCONT)
    said = " ".join(process.communicate()[1].split())
    assert process.returncode == 6, said
    assert "changed or vanished after this run began" in said
    assert not list((out / "scores").glob("a/*"))

    few = write_rows(tmp_path / "few.parquet", rows[:40])
    right = scored(command, few, tmp_path / "right", models["better"], f"--cache-dir={tmp_path / 'empty'}")
    np.testing.assert_allclose(scored(command, few, tmp_path / "genuine", models["better"]), right, atol=1e-4)


def test_a_value_file_in_another_models_namespace_does_not_answer(
    command: Command, data: Path, models: Mapping[str, Path], cache: Path, tmp_path: Path
) -> None:
    """As a restore or a sync into the wrong folder leaves it."""
    right = scored(command, data, tmp_path / "right", models["better"], f"--cache-dir={tmp_path / 'empty'}")
    for name in ("worse", "better"):
        scored(command, data, tmp_path / name, models[name])
    spaces = {json.loads(p.read_text())["weights"]: p.parent for p in cache.glob("logps/v1/*/namespace.json")}
    wrong, own = (spaces[source(models[name]).digest] for name in ("worse", "better"))
    for file in own.glob("*.parquet"):
        file.unlink()
    shutil.rmtree(own / "index", ignore_errors=True)
    (misplaced,) = (Path(shutil.copy(file, own)) for file in wrong.glob("*.parquet"))
    code, said = command("cache", "verify")
    assert (code, "made for another namespace" in said) == (4, True), said
    asked = [f"--data={data}", f"--policy=a={models['better']}", "--loss=orpo", f"--out={tmp_path / 'again'}"]
    code, said = command("run", *asked)
    assert (code, "it was made for another namespace of the cache" in said) == (0, True), said
    assert not misplaced.exists()
    assert (values(tmp_path / "again") == right).all()


@pytest.mark.slow
def test_measured_noise_is_that_of_the_runs_beginning_whoever_measures_meanwhile(
    command: Command, models: Mapping[str, Path], cache: Path, tmp_path: Path
) -> None:
    """A run of cached values killed after its first commit; another one measures on other pairs; the same again."""
    data, other = (write_rows(tmp_path / f"{n}.parquet", preference_rows(200, seed=n)) for n in (0, 1))

    def asked(rows: Path, name: str) -> list[str]:
        model = [f"--policy=a={models['better']}", f"--reference={models['reference']}"]
        return ["run", f"--data={rows}", *model, f"--out={tmp_path / name}"]

    for name in ("first", "whole"):
        code, said = command(*asked(data, name))
        assert code == 0, said
    for attempt in range(5):
        name = f"killed {attempt}"
        line = [sys.executable, "-m", "dpo_score", *asked(data, name), f"--cache-dir={cache}", "--threads=1"]
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path / name / "commits").rglob("*.json")):
            time.sleep(0.001)
        process.kill()
        process.wait()
        if not (tmp_path / name / "summary.json").exists():
            break
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / name / "summary.json").exists()
    assert command(*asked(other, "meanwhile"))[0] == 0
    assert command(*asked(data, name))[0] == 0
    summaries = [json.loads((tmp_path / n / "summary.json").read_text())["policies"] for n in ("whole", name)]
    assert summaries[0] == summaries[1]

    for path in cache.glob("noise/*.json"):
        path.write_text(path.read_text().replace('"sequences": ', '"sequences": 1'))
    assert command(*asked(data, "flipped"))[0] == 0
    assert "holds no measurement" in (tmp_path / "flipped/summary.json").read_text()


def test_a_damaged_conversion_of_a_gguf_file(command: Command, data: Path, cache: Path, tmp_path: Path) -> None:
    """A stretch of zeros in the cache, as a bad disk leaves it: the file's size is as before."""
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    right = scored(command, data, tmp_path / "first", file)
    (weights,) = (path for path in cache.rglob("model.safetensors") if path.is_file())
    content = bytearray(weights.read_bytes())
    content[-576:] = bytes(576)
    weights.write_bytes(content)
    shutil.rmtree(cache / "logps")
    assert (scored(command, data, tmp_path / "second", file) == right).all()


def test_code_of_a_model_that_was_edited(
    command: Command, data: Path, models: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models["better"], tmp_path / "mine"))
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "my.MyConfig", "AutoModelForCausalLM": "my.Mine"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": named}))
    (folder / "my.py").write_text(CODE)
    first = scored(command, data, tmp_path / "first", folder, "--trust-remote-code")
    (folder / "my.py").write_text(CODE.replace("* 1", "* 3"))
    other = scored(command, data, tmp_path / "second", folder, "--trust-remote-code")
    assert np.abs(other - first).min() > 1e-3
    asked = [f"--data={data}", f"--policy=a={folder}", "--loss=orpo", "--trust-remote-code"]
    code, said = command("run", *asked, f"--out={tmp_path / 'first'}")
    assert code != 0, said
    assert (values(tmp_path / "first") == first).all()


def test_a_blob_of_the_hub_cache_with_other_content_than_its_name(
    command: Command, data: Path, models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "hub" / "models--org--tiny"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    for path in models["better"].iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, root / "blobs" / digest)
        (snapshot / path.name).symlink_to(root / "blobs" / digest)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    blob = (snapshot / "model.safetensors").resolve()
    tensors = load_file(blob)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, blob, metadata={"format": "pt"})
    asked = [f"--data={data}", "--policy=a=org/tiny", "--loss=orpo", f"--out={tmp_path / 'out'}"]
    code, said = command("run", *asked)
    assert code != 0
    assert "is damaged: the hub cache keeps it as" in said
    right = scored(command, data, tmp_path / "right", models["better"], f"--cache-dir={tmp_path / 'empty'}")
    assert (scored(command, data, tmp_path / "genuine", models["better"]) == right).all()
