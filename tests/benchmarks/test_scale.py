"""pipelines/SCALE.md says what its arithmetic gives, and what a run is seen to ask of an object store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.benchmarks import bench_requests, scale
from tests.benchmarks.scale import MODEL, SIZES, Run

README = Path(__file__).parents[2] / "README.md"


def test_the_tables_of_the_page_are_those_of_its_constants() -> None:
    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale.rewritten(page) == page, "python -m tests.benchmarks.scale --write"


def test_the_page_is_linked() -> None:
    assert "(pipelines/SCALE.md)" in README.read_text(encoding="utf-8")


def test_the_shape_is_that_of_the_70b_models() -> None:
    assert MODEL.parameters == pytest.approx(70.55e9, rel=1e-3)
    assert MODEL.flops_a_token == pytest.approx(136.9e9, rel=1e-3)


@pytest.mark.parametrize(("pairs", "tokens"), SIZES)
def test_hours_are_work_by_speed(pairs: int, tokens: int) -> None:
    run = Run(pairs, tokens)
    flops = 2 * pairs * tokens * 136.9e9
    assert run.hours(1) == pytest.approx(flops / (0.6 * 989e12) / 3600, rel=1e-3)
    assert run.hours(64) == pytest.approx(run.hours(1) / 64)
    assert (run.blocks - 1) * run.rows_a_block < pairs <= run.blocks * run.rows_a_block


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("DPO_SCORE_SCALE") != "full", reason="a server with thousands of files: by hand")
@pytest.mark.filterwarnings("ignore")
def test_requests_of_a_block_are_those_of_the_page() -> None:
    """With a cache that holds nothing of the policy, and more files of the reference than a page of a listing does.

    On a busy machine a request is now and then sent twice, so a run that does as the page says is looked for.
    """
    tries = (bench_requests.a_block(bench_requests.MANY) for _ in range(3))
    found = ({phase: sum(costs.values()) for phase, costs in each.items()} for each in tries)
    assert any(costs == pytest.approx(scale.REQUESTS) for costs in found)
