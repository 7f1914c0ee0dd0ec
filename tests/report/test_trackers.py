"""What trackers are sent, read back with the real MLflow and TensorBoard; a failure is a sentence, no more."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run
from dpo_score.errors import ConfigError
from dpo_score.report import trackers
from dpo_score.results.run_folder import open_out
from dpo_score.storage.manifest import Manifest
from tests.engine.whole_runs.small_run import small_run
from tests.run_fixtures import Runner, preference_rows, write_rows


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_run(per_token=False).out, tmp_path / "out"))


def sent(out: Path, name: str) -> list[str]:
    store, _ = open_out(str(out))
    return trackers.log_run([name], store, str(out))


def payload(out: Path) -> dict[str, object]:
    store, manifest = open_out(str(out))
    summary = store.read_json("summary.json")
    (found,) = trackers.payloads(summary, manifest, str(out), "<html>")
    return found


def test_one_family_of_checkpoints_by_step_with_trl_names(out: Path) -> None:
    found = payload(out)
    summary = json.loads((out / "summary.json").read_text())
    assert found["family"] == "checkpoints"
    points = found["points"]
    assert isinstance(points, list)
    assert [point["step"] for point in points] == [10, 20, 30]
    overall = summary["policies"]["step-20"]["overall"]
    assert {name: points[1]["values"][name] for name in trackers.TRL_NAMES} == {
        name: overall[name] for name in trackers.TRL_NAMES
    }
    assert "pairs/a/rewards/margins" in points[0]["values"]


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("step-40", "checkpoints"),
        ("dpo-checkpoint-40", "dpo"),
        ("sweep-7", "sweep"),
        ("final", "final"),
        ("v.x_9", "v.x"),
        ("global_step_100", "global"),
        ("ckpt10", "checkpoints"),
        ("sigmoid-0.05", "sigmoid-0.05"),
        ("lr-5e-7", "lr-5e-7"),
        ("lr-5e-7-step-20", "lr-5e-7"),
        ("v1.2", "v1.2"),
        ("step_1000-merged", "step_1000-merged"),
    ],
)
def test_families(name: str, family: str) -> None:
    assert trackers.family_of(name) == family


def keys(manifest: Manifest, *outs: str) -> list[str]:
    summary = {"policies": {}}
    summary["policies"] = json.loads((Path(outs[0]) / "summary.json").read_text())["policies"]
    return [next(trackers.payloads(summary, manifest, out, None))["key"] for out in outs]


def test_an_out_has_its_own_tracker_run_however_it_is_named(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(out)
    _, manifest = open_out(str(out))
    same = keys(manifest, str(out), "out", "link", "./out/", f"file://{out}")
    assert len(set(same)) == 1
    others = keys(manifest, str(out), "other", "s3://bucket/out", "s3://bucket/lr2/out")
    assert len(set(others)) == 4
    begun_anew = replace(manifest, started="2030-01-01T00:00:00+00:00")
    assert keys(begun_anew, str(out)) != keys(manifest, str(out))


def test_tensorboard_files_lie_beside_out_or_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert trackers.tensorboard_folder("runs/dpo") == tmp_path / "runs/tensorboard/dpo"
    assert trackers.tensorboard_folder(f"file://{tmp_path}/dpo") == tmp_path / "tensorboard/dpo"
    assert trackers.tensorboard_folder("s3://bucket/lr1/../out/") == tmp_path / "tensorboard/bucket/lr1/out"


def test_groups_with_odd_names_keep_apart() -> None:
    names = [trackers._plain(name) for name in ("a b.c", "a/b", "a:b", "é" * 200)]
    assert names[0] == "a b.c"
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9_. -]{1,90}", name) for name in names)


def test_no_text_of_the_data_is_sent(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(trackers, "_sent", lambda name, payload: kept.append(json.dumps(payload)))
    assert sent(out, "mlflow") == []
    assert "wizards" not in kept[0]
    assert "</html>" in kept[0]


def test_no_text_is_sent_as_the_name_of_a_group(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    monkeypatch.setattr(trackers, "_sent", lambda name, payload: kept.append(payload["page"]))
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(12))
    runner(data, tmp_path / "sliced", slice=["prompt"], log_to="mlflow")
    assert "wizards" not in kept[0]
    assert "By prompt" in kept[0]
    assert "group 12" in kept[0]


def test_an_unknown_or_missing_tracker_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'mlflow'"):
        trackers.check_trackers(["mlfow"])
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(ConfigError, match="pip install no_such_package"):
        trackers.check_trackers(["wandb"])


def fake(folder: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `name` that a child process imports."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise OSError('server \\x1b[31m away')", "server"),
        ("import sys; sys.exit('no account')", "no account"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
        ("import time; time.sleep(60)", "no answer"),
    ],
)
def test_a_failing_tracker_is_said_and_fails_nothing(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    fake(tmp_path / "fakes", "wandb", source, monkeypatch)
    if "sleep" in source:
        monkeypatch.setattr(trackers, "SECONDS", 5)
    (problem,) = sent(out, "wandb")
    assert said in problem
    assert "\x1b" not in problem


WANDB = """
import json, os, pathlib
class Run:
    def __enter__(self): return self
    def __exit__(self, *_): pathlib.Path(os.environ["WROTE"]).write_text(json.dumps(self.rows))
    rows = []
    offline = os.environ.get("WANDB_MODE") == "offline"
    def define_metric(self, *_, **__): pass
    def log(self, values): self.rows.append(values)
    def log_artifact(self, artifact): self.rows.append({"artifact": artifact.size}); return self
    def wait(self):
        if self.offline: raise RuntimeError("'Artifact.wait' used while in offline mode")
class Artifact:
    def __init__(self, name, type): pass
    def add_file(self, path): self.size = os.path.getsize(path)
def init(**options):
    Run.rows.append(options)
    return Run()
"""


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_is_called_as_it_documents(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    fake(tmp_path / "fakes", "wandb", WANDB, monkeypatch)
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WROTE", str(tmp_path / "wrote.json"))
    assert sent(out, "wandb") == []
    start, *points, artifact = json.loads((tmp_path / "wrote.json").read_text())
    assert start["resume"] == "allow"
    assert [point["checkpoint_step"] for point in points] == [10, 20, 30]
    assert artifact["artifact"] > 10_000


@pytest.mark.slow
def test_tensorboard_reads_back_what_was_logged(out: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert sent(out, "tensorboard") == []
    assert sent(out, "tensorboard") == []
    folder = out.parent / "tensorboard" / "out" / "checkpoints"
    events = EventAccumulator(str(folder))
    events.Reload()
    summary = json.loads((out / "summary.json").read_text())
    found = {scalar.step: scalar.value for scalar in events.Scalars("rewards/margins")}
    assert found == {
        step: pytest.approx(summary["policies"][f"step-{step}"]["overall"]["rewards/margins"], rel=1e-6)
        for step in (10, 20, 30)
    }
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries that MLflow reads its own files with
def test_mlflow_reads_back_what_was_logged(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    assert sent(out, "mlflow") == []
    assert sent(out, "mlflow") == []
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("dpo-score")
    (run,) = client.search_runs([experiment.experiment_id])
    summary = json.loads((out / "summary.json").read_text())
    history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "rewards/chosen")}
    assert history == {step: summary["policies"][f"step-{step}"]["overall"]["rewards/chosen"] for step in (10, 20, 30)}
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["report.html"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries that MLflow reads its own files with
def test_trainings_with_the_same_names_keep_apart_and_a_later_checkpoint_joins_its_own(
    runner: Runner, models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(8))
    better, worse = models["better"], models["worse"]
    log = {"log_to": "mlflow"}
    found = {"lr1": runner(data, tmp_path / "lr1", policy=[f"step-10={better}"], **log)}
    found["lr2"] = runner(data, tmp_path / "lr2", policy=[f"step-10={worse}"], **log)
    found["lr1"] = runner(data, Path("lr1"), policy=[f"step-10={better}", f"step-20={worse}"], **log)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("dpo-score")
    runs = client.search_runs([experiment.experiment_id])
    logged = {
        run.info.run_name: {
            metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "rewards/margins")
        }
        for run in runs
    }
    assert len(runs) == 2
    assert logged == {
        f"{name}/checkpoints": {
            int(policy.removeprefix("step-")): cell["overall"]["rewards/margins"]
            for policy, cell in outcome.summary["policies"].items()
        }
        for name, outcome in found.items()
    }
    assert {len(history) for history in logged.values()} == {1, 2}


def test_a_run_on_an_object_store_says_where_tensorboard_files_are(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kept: list[str] = []
    monkeypatch.setattr(trackers, "_sent", lambda name, payload: kept.append(payload["folder"]))
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(4))
    run(runner.config(data, "memory://bucket/lr1/out", log_to="tensorboard"), Progress())
    assert f"tensorboard --logdir {tmp_path}/tensorboard/bucket/lr1/out" in capsys.readouterr().err
    assert kept == [f"{tmp_path}/tensorboard/bucket/lr1/out/better"]
