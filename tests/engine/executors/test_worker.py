"""What a worker of a cluster does with an assignment: here in one process, without Ray."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_score.config.schema import RunConfig
from dpo_score.engine.context import RunContext, open_context
from dpo_score.engine.executors.pool import shared_config
from dpo_score.engine.executors.worker import Assignment, Report, Worker
from dpo_score.engine.prepare import prepare
from dpo_score.engine.progress import Progress
from dpo_score.errors import IdentityError
from dpo_score.logprobs import scorer
from dpo_score.storage.commits import CommitRecord, read_record, record_name
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.open import open_store
from tests.run_fixtures import preference_rows, write_rows

BLOCKS = 3


def context_of(config: RunConfig) -> RunContext:
    return open_context(config, Progress(quiet=True), open_store(str(config.out)))


@pytest.fixture
def config(runner: Any, tmp_path: Path) -> RunConfig:
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(64 * BLOCKS))
    found: RunConfig = runner.config(data, tmp_path / "out")
    return found


@pytest.fixture
def assignment(config: RunConfig) -> Assignment:
    """All of stage one."""
    job, _ = prepare(config, context_of(config))
    return Assignment.of(job.references[0], tuple(range(BLOCKS)))


def reports(config: RunConfig, assignment: Assignment) -> list[Report]:
    return list(Worker(config, str(Path.cwd())).work(assignment))


def test_a_digest_of_each_record_returns_and_nothing_that_grows_with_rows(
    config: RunConfig, assignment: Assignment
) -> None:
    found = [report for report in reports(config, assignment) if report.block is not None]
    assert [report.block for report in found] == [0, 1, 2]
    store = open_store(str(config.out))
    for report in found:
        record = read_record(store, record_name("reference", int(report.block or 0), BLOCKS))
        assert isinstance(record, CommitRecord)
        assert report.record == digest(record.to_json())
        assert report.rows == record.stop - record.start == 64
        assert len(pickle.dumps(replace(report, lines=(), warnings=()))) < 512


@pytest.mark.parametrize("threads", [1, 2])
def test_a_worker_computes_with_the_threads_of_the_run_whatever_its_machine_has(
    config: RunConfig, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    real = scorer.PairScorer._score_unique

    def counted(self: Any, sequences: Any) -> Any:
        seen.add(torch.get_num_threads())
        return real(self, sequences)

    monkeypatch.setattr(scorer.PairScorer, "_score_unique", counted)
    compute = config.compute.model_copy(update={"threads": threads})
    config = config.model_copy(update={"compute": compute})
    job, _ = prepare(config, context_of(config))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        reports(config, Assignment.of(job.references[0], (0,)))
    finally:
        torch.set_num_threads(before)
    assert seen == {threads}


def test_the_driver_spells_out_threads_and_cache_for_all_machines(config: RunConfig) -> None:
    unsaid = config.model_copy(update={"compute": config.compute.model_copy(update={"threads": None})})
    assert shared_config(unsaid, context_of(unsaid), 7).compute.threads == 7
    prepare(config, context_of(config))
    found = shared_config(unsaid, context_of(unsaid), 7)
    assert found.compute.threads == 1
    assert Path(str(found.cache_dir)).is_absolute()


def test_a_worker_that_sees_other_data_refuses(config: RunConfig, assignment: Assignment, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.parquet", preference_rows(64 * BLOCKS, seed=1))
    with pytest.raises(IdentityError, match="finds other data, models or settings for reference"):
        reports(config, assignment)
