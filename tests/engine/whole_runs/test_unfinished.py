"""Checkpoints that a glob finds before they are written: skipped with the reason, scored once they are whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dpo_score.cli.main import main
from dpo_score.engine import run as local
from dpo_score.engine.executors.job_array import finish
from dpo_score.engine.progress import Progress
from dpo_score.errors import PolicyFailedError
from tests.engine.whole_runs.test_policies import save_adapter
from tests.run_fixtures import Runner, preference_rows, write_rows
from tests.tiny import save_tiny, tiny_model


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "few.parquet", preference_rows(6))


@pytest.fixture
def training(runner: Runner, tmp_path: Path) -> Path:
    """A folder of training with checkpoint-10, whole, and checkpoint-20, still as whole as the first."""
    folder = tmp_path / "training"
    shutil.copytree(runner.models["better"], folder / "checkpoint-10")
    shutil.copytree(runner.models["worse"], folder / "checkpoint-20")
    return folder


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])


def zeros(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def no_weights(folder: Path) -> None:
    """The trainer's own pickles may stand there already: they are not weights."""
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "rng_state.pth").write_bytes(b"pickle")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def absent_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


REASONS: dict[Callable[[Path], None], str] = {
    cut_weights: "truncated",
    cut_header: "not a whole safetensors file",
    zeros: "not a whole safetensors file",
    empty: "0 bytes",
    no_weights: "no weights",
    no_config: "without config.json",
    cut_config: "not valid JSON",
    absent_shard: "1 of them absent",
    no_index: "but no index",
    nothing: "no config.json",
}


@pytest.mark.parametrize("break_off", REASONS, ids=lambda how: how.__name__)
def test_a_half_written_checkpoint_of_a_glob_waits_with_a_reason(
    runner: Runner, data: Path, training: Path, tmp_path: Path, break_off: Callable[[Path], None]
) -> None:
    break_off(training / "checkpoint-20")
    found = runner(data, tmp_path / "out", policy=[f"dpo={training}/checkpoint-*"])
    found.raise_failures()
    assert list(found.summary["policies"]) == ["dpo-10"]
    assert list(found.summary["skipped"]) == ["dpo-20"]
    assert REASONS[break_off] in found.summary["skipped"]["dpo-20"]
    assert json.loads((tmp_path / "out/summary.json").read_text())["skipped"] == found.summary["skipped"]


def test_a_glob_in_which_nothing_is_whole_does_not_end_well(
    runner: Runner, data: Path, training: Path, tmp_path: Path
) -> None:
    sweep = {"policy": [f"dpo={training}/checkpoint-*"]}
    for step in (10, 20):
        cut_weights(training / f"checkpoint-{step}")
    with pytest.raises(PolicyFailedError, match="no policy was scored: none is whole yet of dpo-10, dpo-20"):
        runner(data, tmp_path / "out", **sweep).raise_failures()
    save_tiny(training / "checkpoint-20", seed=11)
    runner(data, tmp_path / "out", **sweep).raise_failures()


def test_the_same_command_scores_what_became_whole_and_what_is_new(
    runner: Runner, data: Path, training: Path, tmp_path: Path, forwards: list[int]
) -> None:
    cut_weights(training / "checkpoint-20")
    sweep = {"policy": [f"dpo={training}/checkpoint-*"]}
    runner(data, tmp_path / "out", **sweep)
    forwards.clear()
    save_tiny(training / "checkpoint-20", seed=11)
    save_tiny(training / "checkpoint-100", seed=12)
    again = runner(data, tmp_path / "out", **sweep)
    assert again.summary["skipped"] == {}
    assert list(again.summary["policies"]) == ["dpo-10", "dpo-20", "dpo-100"]
    assert sum(forwards) == 2 * 2 * 6, "one pass for each of the two, none for reference and first checkpoint"


def test_a_scored_checkpoint_that_is_overwritten_keeps_its_scores(
    runner: Runner, data: Path, training: Path, tmp_path: Path
) -> None:
    sweep = {"policy": [f"dpo={training}/checkpoint-*"]}
    first = runner(data, tmp_path / "out", **sweep)
    cut_weights(training / "checkpoint-20")
    again = runner(data, tmp_path / "out", **sweep)
    assert again.summary == first.summary
    assert again.summary["skipped"] == {}


def test_adapters_wait_too(runner: Runner, data: Path, tmp_path: Path) -> None:
    base = runner.models["reference"]
    for step in (1, 2, 3):
        save_adapter(tmp_path / f"lora/checkpoint-{step}", base, step)
    (tmp_path / "lora/checkpoint-2/adapter_model.safetensors").unlink()
    (tmp_path / "lora/checkpoint-3/adapter_config.json").unlink()
    found = runner(data, tmp_path / "out", policy=[f"lora={tmp_path}/lora/checkpoint-*"], policy_base="reference")
    found.raise_failures()
    assert list(found.summary["policies"]) == ["lora-1"]
    assert "adapter is half written" in found.summary["skipped"]["lora-2"]
    assert "no config.json" in found.summary["skipped"]["lora-3"]


def test_a_base_that_is_half_written_is_a_failure_of_every_adapter(runner: Runner, data: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(runner.models["better"], tmp_path / "base"))
    save_adapter(tmp_path / "lora/checkpoint-1", base, 1)
    cut_weights(base)
    found = runner(data, tmp_path / "out", policy=[f"lora={tmp_path}/lora/checkpoint-*"])
    assert found.summary["skipped"] == {}
    with pytest.raises(PolicyFailedError, match="lora-1"):
        found.raise_failures()


def test_named_by_itself_it_is_a_failure(runner: Runner, data: Path, training: Path, tmp_path: Path) -> None:
    cut_weights(training / "checkpoint-20")
    policies = [f"dpo-{step}={training}/checkpoint-{step}" for step in (10, 20)]
    found = runner(data, tmp_path / "out", policy=policies)
    assert found.summary["skipped"] == {}
    with pytest.raises(PolicyFailedError, match=r"dpo-20: .*truncated"):
        found.raise_failures()


def test_a_whole_checkpoint_that_does_not_fit_is_a_failure_of_a_glob_too(
    runner: Runner, data: Path, training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = training / "checkpoint-20" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 48}))
    command = ["run", f"--data={data}", f"--reference={runner.models['reference']}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stop:
        main([*command, f"--cache-dir={runner.cache}", f"--policy=dpo={training}/checkpoint-*", "--quiet"])
    assert stop.value.code == 6
    assert "dpo-20" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "out/summary.json").read_text())["policies"]) == ["dpo-10"]


def test_it_is_said_on_the_screen_and_in_the_report(
    runner: Runner, data: Path, training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_weights(training / "checkpoint-20")
    command = ["run", f"--data={data}", f"--reference={runner.models['reference']}", f"--out={tmp_path / 'out'}"]
    with suppress(SystemExit):
        main([*command, f"--cache-dir={runner.cache}", f"--policy=dpo={training}/checkpoint-*", "--quiet"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "dpo-20: skipped" in shown
    assert "truncated" in shown
    assert "dpo-20 is not here" in (tmp_path / "out/report.html").read_text()


def test_weights_that_change_while_the_run_works_wait(
    runner: Runner, data: Path, training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = local.run_references

    def meanwhile(context: object, job: object) -> object:
        found = real(context, job)  # type: ignore[arg-type]
        save_tiny(training / "checkpoint-20", seed=13)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(local, "run_references", meanwhile)
        found = runner(data, tmp_path / "out", policy=[f"dpo={training}/checkpoint-*"])
    found.raise_failures()
    assert "changed" in found.summary["skipped"]["dpo-20"]
    again = runner(data, tmp_path / "out", policy=[f"dpo={training}/checkpoint-*"])
    assert list(again.summary["policies"]) == ["dpo-10", "dpo-20"]


def test_shares_of_a_job_array_skip_it_and_finish_says_so(
    runner: Runner, data: Path, training: Path, tmp_path: Path
) -> None:
    from dpo_score.engine.executors import choose as engines

    cut_weights(training / "checkpoint-20")
    config = runner.config(data, tmp_path / "out", policy=[f"dpo={training}/checkpoint-*"], blocks="0/1")
    engines.run(config, Progress(quiet=True)).raise_failures()
    found = finish(str(tmp_path / "out"), Progress(quiet=True))
    found.raise_failures()
    assert list(found.summary["skipped"]) == ["dpo-20"]


# --- the reference implementation's folders: step-N/policy.pt beside the optimizer's own pickles --------------------


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """step-9 and step-10, each with policy.pt, optimizer.pt and scheduler.pt."""
    folder = tmp_path / "reference-run"
    for step in (9, 10):
        (folder / f"step-{step}").mkdir(parents=True)
        content = {"step_idx": step, "state": tiny_model(seed=step).state_dict(), "metrics": {}}
        torch.save(content, folder / f"step-{step}/policy.pt")
        torch.save({"lr": 0.1}, folder / f"step-{step}/optimizer.pt")
        torch.save({"lr": 0.1}, folder / f"step-{step}/scheduler.pt")
    return folder


@pytest.mark.parametrize("pattern", ["step-*", "step-*/policy.pt", "step-*/*.pt", "*"])
def test_state_files_are_swept_by_folder_and_by_file(
    runner: Runner, data: Path, steps: Path, tmp_path: Path, pattern: str
) -> None:
    sweep = {"policy": [f"dpo={steps}/{pattern}"], "policy_base": "reference", "allow_pickle": True}
    found = runner(data, tmp_path / "out", **sweep)
    found.raise_failures()
    assert found.summary["skipped"] == {}
    assert list(found.summary["policies"]) == ["dpo-9", "dpo-10"]
    margins = [policy["overall"]["margins"]["mean"] for policy in found.summary["policies"].values()]
    assert len({*margins, 0.0}) == 3, "each has its own weights, and neither the base's"


@pytest.mark.parametrize("pattern", ["step-*", "step-*/policy.pt"])
@pytest.mark.parametrize(("left", "reason"), [(-100, "policy.pt is truncated"), (0, "policy.pt is empty")])
def test_a_half_written_state_file_waits(
    runner: Runner, data: Path, steps: Path, tmp_path: Path, pattern: str, left: int, reason: str
) -> None:
    path = steps / "step-10/policy.pt"
    path.write_bytes(path.read_bytes()[:left])
    sweep = {"policy": [f"dpo={steps}/{pattern}"], "policy_base": "reference", "allow_pickle": True}
    found = runner(data, tmp_path / "out", **sweep)
    found.raise_failures()
    assert list(found.summary["policies"]) == ["dpo-9"]
    assert reason in found.summary["skipped"]["dpo-10"]


@pytest.mark.parametrize("pattern", ["step-*", "step-*/policy.pt"])
@pytest.mark.parametrize(
    ("options", "message"), [({"policy_base": "reference"}, "--allow-pickle"), ({}, "--policy-base reference")]
)
def test_what_waiting_would_not_mend_is_a_failure(
    runner: Runner, data: Path, steps: Path, tmp_path: Path, pattern: str, options: dict[str, str], message: str
) -> None:
    found = runner(data, tmp_path / "out", policy=[f"dpo={steps}/{pattern}"], **options)
    assert found.summary["skipped"] == {}
    with pytest.raises(PolicyFailedError, match=message) as error:
        found.raise_failures()
    assert "dpo-9" in str(error.value)


def test_a_folder_of_several_state_files_names_them(runner: Runner, data: Path, steps: Path, tmp_path: Path) -> None:
    (steps / "step-10/policy.pt").rename(steps / "step-10/a.pt")
    torch.save({}, steps / "step-10/b.pt")
    sweep = {"policy": [f"dpo={steps}/step-*"], "policy_base": "reference", "allow_pickle": True}
    found = runner(data, tmp_path / "out", **sweep)
    assert list(found.summary["policies"]) == ["dpo-9"]
    assert "to read one of a.pt, b.pt over a base, name that file" in found.summary["failed"]["dpo-10"]
