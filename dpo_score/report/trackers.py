"""`--log-to mlflow|wandb|tensorboard`: the numbers of a finished run, under TRL's metric names, at checkpoint steps.

Promises: a tracker works in a process of its own with a time limit, so nothing it does can fail, hang or colour the
run; what went wrong is returned as a sentence. No text of the data is sent: the report that goes along has none.
Logging again from one OUT adds to the same tracker run; another OUT, or one begun anew, never does. Does not: install
trackers, or ask for accounts (each reads its own environment variables, such as MLFLOW_TRACKING_URI or WANDB_API_KEY).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_score.errors import ConfigError, DpoScoreError, nearest
from dpo_score.escape import safe, without_secrets
from dpo_score.report.build import gather
from dpo_score.report.page import render
from dpo_score.results.run_folder import STEP, read_summary, step_of
from dpo_score.storage.base import Store
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.manifest import Manifest, read_manifest

PACKAGES = {"mlflow": "mlflow", "wandb": "wandb", "tensorboard": "tensorboard"}
"""Tracker → the Python package it needs."""
SECONDS = 300
TRL_NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
Values = dict[str, float]


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError for an unknown tracker, or one whose package is not installed: before any work."""
    for name in names:
        if name not in PACKAGES:
            raise ConfigError(f"--log-to {name}: {nearest(name, PACKAGES)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(f"--log-to {name} needs a package that is not here: pip install {PACKAGES[name]}")


def log_run(names: Sequence[str], store: Store, out: str) -> list[str]:
    """Send a finished run to each tracker; a sentence for each that failed. Never raises for a tracker's sake."""
    manifest = read_manifest(store)
    assert manifest is not None
    summary = read_summary(store, manifest, out)
    page = _page(store, manifest, out)
    problems = []
    for name in names:
        for payload in payloads(summary, manifest, out, page):
            problem = _sent(name, payload)
            if problem:
                problems.append(f"--log-to {name}: nothing was logged for {payload['family']}: {problem}")
    return problems


def _page(store: Store, manifest: Manifest, out: str) -> str | None:
    """The report without texts; None where there is nothing to report."""
    try:
        return render(gather(store, manifest, out, no_text=True))
    except DpoScoreError:
        return None


def payloads(summary: Mapping[str, Any], manifest: Manifest, out: str, page: str | None) -> Iterator[dict[str, Any]]:
    """One tracker run for each family of checkpoints: its points by step, as JSON values."""
    families: dict[str, list[dict[str, Any]]] = {}
    for name, policy in summary["policies"].items():
        model = str(manifest.notes.get("names", {}).get(name, ""))
        point = {"step": step_of(name, model) or 0, "policy": name, "values": metrics_of(policy)}
        families.setdefault(family_of(name), []).append(point)
    for family, points in families.items():
        points.sort(key=lambda point: int(point["step"]))
        key = digest([_address(out), manifest.started, family])[:32]
        folder = tensorboard_folder(out)
        yield {
            "title": folder.name,
            "folder": str(folder / family),
            "family": family,
            "key": key,
            "points": points,
            "page": page,
        }


def family_of(name: str) -> str:
    """The name without the step at its end: checkpoints of one training share it."""
    return STEP.sub("", name) or "checkpoints"


def _address(out: str) -> str:
    """OUT's URL, or the folder that its path leads to from wherever it is said."""
    return out.rstrip("/") if _is_url(out) else str(Path(out.removeprefix("file://")).resolve())


def _is_url(out: str) -> bool:
    """Whether OUT is on an object store, not a folder of this machine."""
    return "://" in out and not out.startswith("file://")


def tensorboard_folder(out: str) -> Path:
    """tensorboard/<OUT> beside OUT; of an OUT that is no folder here, tensorboard/<bucket>/<path> in this folder."""
    if not _is_url(out):
        place = Path(out.removeprefix("file://")).absolute()
        return place.parent / "tensorboard" / place.name
    parts = [part for part in out.split("://", 1)[1].split("/") if part not in ("", ".", "..")]
    return Path("tensorboard", *parts).absolute()


def metrics_of(policy: Mapping[str, Any]) -> Values:
    """Metric name → number: TRL's names overall, then those of each data set and subset under its name."""
    found = dict(_named("", policy["overall"]))
    if len(policy["datasets"]) > 1:
        for dataset, cell in policy["datasets"].items():
            found.update(_named(f"{_plain(dataset)}/", cell))
    for dataset, subsets in policy["subsets"].items():
        for subset, cell in subsets.items():
            found.update(_named(f"{_plain(dataset)}/{_plain(subset)}/", cell))
    return found


def _named(prefix: str, cell: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    others = {
        "loss": cell["loss"]["mean"],
        "margins_nats": cell["margins_nats"]["mean"],
        "accuracy": cell["accuracy"]["value"],
        **dict(zip(("accuracy/low", "accuracy/high"), cell["accuracy"]["ci95"] or (), strict=False)),
    }
    for name, value in {**{name: cell[name] for name in TRL_NAMES}, **others}.items():
        if value is not None:
            yield prefix + name, float(value)


def _plain(name: str) -> str:
    """A group's name in the characters that all trackers take; a changed one carries a digest, so none collide."""
    plain = re.sub(r"[^A-Za-z0-9_. -]", "_", name)[:80]
    return plain if plain == name else f"{plain}-{digest(name)[:6]}"


def _sent(name: str, payload: Mapping[str, Any]) -> str | None:
    """Why it failed, or None."""
    command = [sys.executable, "-m", "dpo_score.report.trackers", name]
    here = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)  # the child finds what this process found
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": SECONDS, "check": False}
    try:
        given = without_secrets(json.dumps(payload))
        done = subprocess.run(command, input=given, env={**os.environ, "PYTHONPATH": here}, **how)
    except subprocess.TimeoutExpired:
        return f"no answer within {SECONDS} s"
    except OSError as error:
        return f"no process for it: {error}"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return safe(lines[-1].strip(), 300)


# --- in the tracker's own process ------------------------------------------------------------------------------------


def to_tensorboard(payload: Mapping[str, Any]) -> None:
    """Event files in a folder for each family, so that `tensorboard --logdir tensorboard` shows all."""
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(payload["folder"])
    with SummaryWriter(str(folder), purge_step=0) as writer:  # what was logged before is replaced
        for point in payload["points"]:
            for name, value in point["values"].items():
                writer.add_scalar(name, value, point["step"])
    if payload["page"] is not None:
        (folder / "report.html").write_text(payload["page"], "utf-8")


def to_mlflow(payload: Mapping[str, Any]) -> None:
    """One MLflow run a family, found again by its key; experiment from MLFLOW_EXPERIMENT_NAME, else dpo-score."""
    import mlflow

    experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "dpo-score"))
    client = mlflow.MlflowClient()
    before = client.search_runs([experiment.experiment_id], f"tags.dpo_score_key = '{payload['key']}'", max_results=1)
    known = {"run_id": before[0].info.run_id} if before else {"run_name": f"{payload['title']}/{payload['family']}"}
    with mlflow.start_run(**known, tags={"dpo_score_key": payload["key"]}):
        for point in payload["points"]:
            mlflow.log_metrics(point["values"], step=point["step"])
        if payload["page"] is not None:
            mlflow.log_text(payload["page"], "report.html")


def to_wandb(payload: Mapping[str, Any]) -> None:
    """One W&B run a family, resumed by its key; project from WANDB_PROJECT, else dpo-score."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", "dpo-score")
    name = f"{payload['title']}/{payload['family']}"
    with wandb.init(project=project, name=name, id=payload["key"], resume="allow") as run:
        run.define_metric("checkpoint_step")
        run.define_metric("*", step_metric="checkpoint_step")
        for point in payload["points"]:
            run.log({**point["values"], "checkpoint_step": point["step"]})
        if payload["page"] is not None:
            with tempfile.TemporaryDirectory() as folder:
                page = Path(folder) / "report.html"
                page.write_text(payload["page"], "utf-8")
                artifact = wandb.Artifact(f"report-{payload['key'][:12]}", type="report")
                artifact.add_file(str(page))
                sent = run.log_artifact(artifact)
                if not run.offline:  # offline it is kept for `wandb sync`, and cannot be waited for
                    sent.wait()


SENDERS = {"mlflow": to_mlflow, "wandb": to_wandb, "tensorboard": to_tensorboard}


def main(arguments: Sequence[str]) -> None:
    """`python -m dpo_score.report.trackers NAME`, the payload as JSON on standard input."""
    SENDERS[arguments[0]](json.load(sys.stdin))


if __name__ == "__main__":
    main(sys.argv[1:])
