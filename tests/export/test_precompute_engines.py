"""Which processes fill the cache for `precompute` without a folder for the data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_score.config.schema import RunConfig
from dpo_score.engine import run as local
from dpo_score.engine.context import RunContext
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError
from dpo_score.export import precompute as stage
from dpo_score.export.precompute import precompute
from tests.run_fixtures import preference_rows, write_rows


@pytest.fixture
def config(runner: Any, tmp_path: Path) -> RunConfig:
    data = write_rows(tmp_path / "pairs.parquet", preference_rows(20))
    found: RunConfig = runner.config(data, None, policy=[])
    return found


class FakePool:
    """Workers of this machine; `worked`: folder and blocks of what they were given."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.worked: list[tuple[str, list[int]]] = []

    def work(self, job: Any, task: Any, todo: Sequence[int]) -> None:
        assert (Path(job.config.out) / "manifest.json").is_file()
        self.worked.append((job.config.out, list(todo)))
        local.compute_blocks(self.context, job, task, local.block_steps(self.context, job, task), todo)


def test_the_workers_of_the_engine_fill_the_cache(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, forwards: list[int]
) -> None:
    pools: list[FakePool] = []

    @contextmanager
    def with_workers(config: RunConfig, context: RunContext) -> Iterator[tuple[RunConfig, RunContext]]:
        pools.append(FakePool(context))
        yield config, replace(context, workers=pools[-1])

    monkeypatch.setattr(stage, "with_workers", with_workers)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    compute = config.compute.model_copy(update={"engine": "ray"})
    found = precompute(config.model_copy(update={"compute": compute}), Progress(quiet=True))
    assert (found.out, found.summary["scored"], [blocks for _, blocks in pools[0].worked]) == (None, 20, [[0]])
    assert not Path(pools[0].worked[0][0]).exists()
    forwards.clear()
    precompute(config, Progress(quiet=True))
    assert forwards == []


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_cluster_does_not_see_a_folder_of_this_machine(
    config: RunConfig, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = {"ray_address": "10.0.0.1:6379"} if by == "option" else {"engine": "ray"}
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    cluster = config.model_copy(update={"compute": config.compute.model_copy(update=address)})
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1:6379.*--out DIR.*--engine local"):
        precompute(cluster, Progress(quiet=True))
