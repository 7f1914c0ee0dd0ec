"""A reference that a policy brings along may need the plain path: it is taken, said, and remembered by OUT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_score.config.schema import ModelSpec, PolicySpec, RunConfig
from dpo_score.engine.context import open_context
from dpo_score.engine.executors.worker import Assignment, Worker
from dpo_score.engine.model_logprobs import CachedLogprobs, FastPathRefusedError
from dpo_score.engine.prepare import prepare
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import run, with_own_numerics
from dpo_score.errors import ModelError
from dpo_score.logprobs import numerics
from dpo_score.storage.open import open_store
from tests.families import family
from tests.run_fixtures import preference_rows, write_rows
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ALiBi: the fast path does not reproduce it."""
    folder = tmp_path_factory.mktemp("bloom") / "bloom"
    family("bloom", 1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def config(runner: Any, bloom: Path, tmp_path: Path) -> RunConfig:
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(70))
    own = ModelSpec(model=str(bloom))
    policies = (
        PolicySpec(name="plain", model=str(runner.models["better"])),
        PolicySpec(name="own", model=str(runner.models["better"]), reference=own),
    )
    found: RunConfig = runner.config(data, tmp_path / "out").model_copy(update={"policies": policies})
    return found


def scores(out: str | None, policy: str) -> pl.DataFrame:
    return pl.read_parquet(f"{out}/scores/{policy}/*.parquet")


def test_it_goes_on_on_the_plain_path(runner: Any, bloom: Path, config: RunConfig, tmp_path: Path) -> None:
    progress = Progress(quiet=True)
    assert not run(config, progress).failures
    [said] = progress.warnings
    assert said.startswith("reference of own: scored on the plain path, which is slower")
    alone = runner(tmp_path / "pairs.parquet", tmp_path / "alone", reference=str(bloom))
    assert not alone.failures
    own, expected = scores(config.out, "own"), scores(str(tmp_path / "alone"), "better")
    for side in ("chosen", "rejected"):
        assert (own[f"ref_{side}_logps"] - expected[f"ref_{side}_logps"]).abs().max() < 1e-4  # two passes
        assert own[f"policy_{side}_logps"].equals(scores(config.out, "plain")[f"policy_{side}_logps"])


def test_the_same_command_computes_nothing_more(config: RunConfig, forwards: list[int]) -> None:
    first = run(config, Progress(quiet=True))
    before = scores(config.out, "own")
    forwards.clear()
    again = run(config, Progress(quiet=True))
    assert forwards == []
    assert again.summary == first.summary
    assert scores(config.out, "own").equals(before)
    manifest = json.loads(Path(f"{config.out}/manifest.json").read_text())
    assert manifest["numerics"]["reference/own"]["path"] == "plain"
    assert manifest["numerics"]["run"]["path"] == "fast"
    assert manifest["identities"]["policies"]["own"]["reference"]["numerics"]["path"] == "plain"


def test_it_is_remembered_for_a_policy_that_cannot_be_resolved_yet(
    config: RunConfig, runner: Any, tmp_path: Path
) -> None:
    later = tmp_path / "later"
    plain, own = config.policies
    config = config.model_copy(update={"policies": (plain, own.model_copy(update={"model": str(later)}))})
    assert list(run(config, Progress(quiet=True)).failures) == ["own"]
    later.symlink_to(runner.models["worse"])
    assert not run(config, Progress(quiet=True)).failures


def test_a_worker_that_began_before_reads_the_manifest_again(config: RunConfig) -> None:
    context = open_context(config, Progress(quiet=True), open_store(str(config.out)))
    job, _ = prepare(config, context)
    worker = Worker(config, str(Path.cwd()))
    list(worker.work(Assignment.of(job.references[0], (0, 1))))
    refused = Assignment.of(job.references[1], (0, 1))
    with pytest.raises(FastPathRefusedError) as refusal:
        list(worker.work(refused))
    job = with_own_numerics(context, job, job.references[1], refusal.value)
    for task in (job.references[1], job.policies[1]):
        assert [r.block for r in worker.work(Assignment.of(task, (0, 1))) if r.block is not None] == [0, 1]


def test_the_runs_own_reference_has_its_numerics_and_says_what_to_do(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: CachedLogprobs, model: Any) -> None:
        raise FastPathRefusedError("made up for this test", numerics.on_plain_path(self._begun))

    monkeypatch.setattr(CachedLogprobs, "_verify", refuse)
    with pytest.raises(ModelError, match="reference: made up for this test"):
        run(config, Progress(quiet=True))
