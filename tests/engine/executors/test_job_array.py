"""A run divided among independent processes leaves what one would have left."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_score.config.load import load_config
from dpo_score.config.schema import RunConfig
from dpo_score.engine import run as local
from dpo_score.engine.executors import choose as engines
from dpo_score.engine.executors import job_array as shares
from dpo_score.engine.plan import RowBlocks
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError, Interrupted, UsageError
from dpo_score.results.verify.verify import verify
from dpo_score.storage.commits import CommitRecord, commit, read_records, record_name
from dpo_score.storage.local import LocalStore
from dpo_score.storage.manifest import read_manifest, save_manifest
from dpo_score.storage.open import open_store
from tests.run_fixtures import preference_rows, write_rows

RESULTS = ("scores", "reference", "rejects", "summary.json", "README.md")
QUIET = Progress(quiet=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = preference_rows(300)
    rows[130]["chosen"] = None
    return write_rows(tmp_path / "pairs.parquet", rows)


def results(out: Path) -> dict[str, bytes]:
    found = [path for name in RESULTS for path in [out / name, *sorted((out / name).rglob("*"))] if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


@given(st.integers(1, 500), st.integers(64, 100), st.integers(1, 9), st.integers(1, 600))
def test_every_block_belongs_to_one_share(total: int, size: int, n: int, limit: int) -> None:
    whole = RowBlocks(total, size, limit)
    parts = [RowBlocks(total, size, limit, share=(i, n)) for i in range(n)]
    assert [block for part in parts for block in part] == list(whole)
    assert sum(part.mine for part in parts) == whole.mine == whole.wanted


def test_shares_and_finish_leave_what_one_run_leaves(runner: Any, data: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    runner(data, whole, cache_dir=str(tmp_path / "other"))
    for index in (2, 0, 1):
        engines.run(runner.config(data, out, blocks=f"{index}/3"), QUIET)
        assert not (out / "summary.json").exists()
    outcome = shares.finish(str(out), QUIET)
    assert outcome.summary["policies"]["better"]["overall"]["scored"] == 299
    assert results(out) == results(whole)
    found = read_manifest(open_store(out))
    assert found is not None
    assert found.state == "complete"
    verify(str(out)).raise_damage()


def test_finish_names_the_blocks_that_are_missing(runner: Any, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for index in (0, 2):
        engines.run(runner.config(data, out, blocks=f"{index}/5"), QUIET)
    with pytest.raises(UsageError, match=r"(?s)reference: 1, 3-4 of 5 blocks.*scores/better: 1, 3-4"):
        shares.finish(str(out), QUIET)


def test_a_share_may_be_repeated_and_a_whole_run_continues_shares(
    runner: Any, data: Path, tmp_path: Path, forwards: list[int]
) -> None:
    out = tmp_path / "out"
    engines.run(runner.config(data, out, blocks="1/2"), QUIET)
    forwards.clear()
    engines.run(runner.config(data, out, blocks="1/2"), QUIET)
    assert forwards == []
    runner(data, out)
    assert forwards != []


def test_a_policy_that_no_share_could_score_is_left_out(runner: Any, data: Path, tmp_path: Path) -> None:
    out, policies = tmp_path / "out", [f"better={runner.models['better']}", f"gone={tmp_path}/nowhere"]
    found = engines.run(runner.config(data, out, blocks="0/1", policy=policies), QUIET)
    assert list(found.failures) == ["gone"]
    assert list(shares.finish(str(out), QUIET).failures) == ["gone"]
    with pytest.raises(ConfigError, match="no such policy; it has better, gone"):
        shares.finish(str(out), QUIET, without=["worse"])
    assert shares.finish(str(out), QUIET, without=["gone"]).failures == {}


@pytest.mark.parametrize("blocks", ["3/3", "1", "-1/2", "0/0", "a/b"])
def test_a_share_that_is_none_is_refused(blocks: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="counted from 0"):
        load_config(None, {"data": ["a.parquet"], "blocks": blocks}, environment={})


def test_what_does_not_go_with_shares_is_refused(runner: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="throw away what the others computed"):
        engines.run(runner.config(data, tmp_path / "out", blocks="0/2"), QUIET, restart=True)
    with pytest.raises(ConfigError, match="choose one"):
        engines.run(runner.config(data, tmp_path / "out", blocks="0/2", engine="ray"), QUIET)
    with pytest.raises(ConfigError, match="leave it out here"):
        runner(data, tmp_path / "out", blocks="0/2")


# --- the end knows what the shares were asked for ---------------------------------------------------------------


def finished(out: Path) -> dict[str, int]:
    """Pairs that the summary counts, by policy."""
    policies = shares.finish(str(out), QUIET).summary["policies"]
    return {name: policy["overall"]["n"] for name, policy in policies.items()}


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Three blocks."""
    return write_rows(tmp_path / "few.parquet", preference_rows(130))


@pytest.fixture
def share(runner: Any, few: Path, tmp_path: Path) -> Callable[..., Any]:
    """`share("0/2", **options)` runs one share of tmp_path/out."""
    return lambda blocks, **options: engines.run(runner.config(few, tmp_path / "out", blocks=blocks, **options), QUIET)


def test_shares_of_everything_after_a_run_of_a_few_rows(
    runner: Any, few: Path, tmp_path: Path, share: Callable[..., Any]
) -> None:
    runner(few, tmp_path / "out", limit=64)
    share("0/2")
    assert read_manifest(open_store(tmp_path / "out")).state == "running"  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"(?s)scores/better: 1-2 of 3.*run .*/out/pipeline.yaml --out .*/out \("):
        finished(tmp_path / "out")
    share("1/2")
    assert finished(tmp_path / "out") == {"better": 130}
    share("1/2")
    assert read_manifest(open_store(tmp_path / "out")).state == "complete"  # type: ignore[union-attr]
    verify(str(tmp_path / "out")).raise_damage()


def test_shares_with_different_limits_have_no_end(tmp_path: Path, share: Callable[..., Any]) -> None:
    share("0/1")
    share("0/1", limit=70)
    with pytest.raises(UsageError, match="asks for the first 70 rows, but 130 are scored"):
        finished(tmp_path / "out")
    share("0/1")
    assert finished(tmp_path / "out") == {"better": 130}


def test_a_block_of_fewer_rows_than_are_wanted_now_is_missing(
    runner: Any, few: Path, tmp_path: Path, share: Callable[..., Any]
) -> None:
    runner(few, tmp_path / "out", limit=129)
    share("0/3")
    with pytest.raises(UsageError, match="scores/better: 2 of 3 blocks"):
        finished(tmp_path / "out")


def test_shares_after_a_run_that_was_stopped(
    runner: Any, few: Path, tmp_path: Path, share: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = local.reference_block

    def stopped(job: Any, reference: Any, text: Any, values: Any) -> Any:
        if text.block == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return true(job, reference, text, values)

    with monkeypatch.context() as patch:
        patch.setattr(local, "reference_block", stopped)
        with pytest.raises(Interrupted):
            runner(few, tmp_path / "out")
    with pytest.raises(UsageError, match=r"no pipeline.yaml: the run .* has not ended, and no share .* was started"):
        finished(tmp_path / "out")
    share("0/1")
    assert finished(tmp_path / "out") == {"better": 130}


def test_a_share_that_dies_before_it_has_written_anything_but_the_manifest(
    tmp_path: Path, share: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = LocalStore.write_bytes

    def dies(self: LocalStore, name: str, *rest: Any, **how: Any) -> bool:
        if name == "pipeline.yaml":
            raise KeyboardInterrupt
        return true(self, name, *rest, **how)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "write_bytes", dies)
        with pytest.raises(KeyboardInterrupt):
            share("0/2")
    assert read_manifest(open_store(tmp_path / "out")) is not None
    share("0/2")
    share("1/2")
    assert finished(tmp_path / "out") == {"better": 130}


def test_a_policy_that_one_share_never_scored_is_missed(
    runner: Any, few: Path, tmp_path: Path, share: Callable[..., Any]
) -> None:
    out, worse = tmp_path / "out", [f"worse={runner.models['worse']}"]
    runner(few, out)
    share("0/2", policy=worse, loss="ipo")
    with pytest.raises(UsageError, match=r"scores/worse: 1-2 of 3 blocks"):
        finished(out)
    share("1/2", policy=worse, loss="ipo")
    assert finished(out) == {"better": 130, "worse": 130}


def test_a_policy_that_a_run_was_given_and_no_share_is_missed(
    runner: Any, few: Path, tmp_path: Path, share: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local, "policy_block", dies)
        with pytest.raises(KeyboardInterrupt):
            runner(few, tmp_path / "out", policy=[f"worse={runner.models['worse']}"])
    share("0/1")
    with pytest.raises(UsageError, match=r"(?s)scores/worse: 0-2 of 3 blocks.*give it to them, too.*--without"):
        finished(tmp_path / "out")
    outcome = shares.finish(str(tmp_path / "out"), QUIET, without=["worse"])
    assert list(outcome.summary["policies"]) == ["better"]


def on_gpu(out: Path) -> None:
    """OUT as a run on a GPU leaves it: the same numbers, other numerics."""
    store = open_store(out)
    found = read_manifest(store)
    assert found is not None

    def moved(fields: Any) -> Any:
        return {**fields, "numerics": {**fields["numerics"], "device": "cuda:99", "device_kind": "cuda"}}

    names = found.identities
    names = replace(names, reference=moved(names.reference), policies={k: moved(v) for k, v in names.policies.items()})
    hardware = {"device": "NVIDIA H200", "kernel": "varlen"}
    numerics = {"run": moved({"numerics": found.numerics["run"]})["numerics"]}
    save_manifest(store, replace(found, identities=names, numerics=numerics, versions={**found.versions, **hardware}))
    for stage, identity in (("reference", names.reference_digest), ("scores/better", names.policy_digest("better"))):
        for record in read_records(store, stage).values():
            assert isinstance(record, CommitRecord)
            store.remove(record.name)
            commit(store, replace(record, identity=identity))


def test_what_was_computed_on_gpus_is_finished_where_there_are_none(
    runner: Any, few: Path, tmp_path: Path, share: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    share("0/1")
    on_gpu(out)
    assert finished(out) == {"better": 130}
    runner(few, out, strict_env=True)
    store = open_store(out)
    assert read_manifest(store).warnings == ()  # type: ignore[union-attr]
    store.remove(record_name("scores/better", 2, 3))
    with pytest.raises(ConfigError, match="is to be computed on cuda:99, and torch sees no such device here"):
        runner(few, out, cache_dir=str(tmp_path / "other"))


def quietly(config: RunConfig) -> None:
    torch.set_num_threads(1)
    engines.run(config, Progress(quiet=True))


@pytest.mark.slow
def test_shares_in_processes_that_start_at_one_instant(runner: Any, data: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    context = multiprocessing.get_context("spawn")
    configs = [runner.config(data, out, blocks=f"{index}/3") for index in range(3)]
    processes = [context.Process(target=quietly, args=(config,)) for config in configs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    shares.finish(str(out), QUIET)
    runner(data, whole, cache_dir=str(tmp_path / "other"))
    assert results(out) == results(whole)
