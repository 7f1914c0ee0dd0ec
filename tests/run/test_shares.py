"""A run divided among independent processes leaves what one would have left."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_score.config import RunConfig
from dpo_score.errors import ConfigError, UsageError
from dpo_score.pipeline import load_config
from dpo_score.run import engines, shares
from dpo_score.run.job import Rows
from dpo_score.run.progress import Progress
from dpo_score.run.verify import verify
from dpo_score.store.manifest import read_manifest
from dpo_score.store.storage import open_store
from tests.run.conftest import preference_rows, write_rows

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
    whole = Rows(total, size, limit)
    parts = [Rows(total, size, limit, share=(i, n)) for i in range(n)]
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
