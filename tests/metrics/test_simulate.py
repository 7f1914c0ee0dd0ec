"""A small seeded share of the simulations: the promises of `python -m tests.metrics.simulate` hold."""

from __future__ import annotations

import pytest

from tests.metrics.simulate import PARTS

RUNS = {"gates": 6, "calibrations": 20, "lengths": 40}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_promised_is_kept(part: str) -> None:
    lines = list(PARTS[part](RUNS.get(part, 60), 1))
    assert lines
    assert [one for one in lines if not one.kept] == []
