"""The section on training sets: the rules' numbers for the pairs of the page, and no section where it says nothing."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_score.metrics.compare import AlignedPolicies, align_policies
from dpo_score.report.training_set import training_set
from tests.metrics.scored import scored


def aligned(pairs: int, spread: float = 3.0, prompts: list[str] | None = None) -> AlignedPolicies:
    draw = np.random.default_rng(0)
    nats = (draw.normal(1.0, spread, pairs) * (spread > 0) for _ in "ab")
    return align_policies([scored(name, values, prompts=prompts) for name, values in zip("ab", nats, strict=True)])


def test_every_rule_has_a_row_and_a_sentence() -> None:
    found = training_set(aligned(80))
    assert found is not None
    assert [row["rule"] for row in found["rows"]] == [
        *("margin:high", "margin:low", "difficulty", "on-policy", "random", "agree", "suspect", "all pairs")
    ]
    assert found["keep"] == 20
    for name in ("accuracy", "margin", "length", "suspect", "saturated"):
        assert all(" … " in row[name]["interval"] for row in found["rows"][:1]), name
    assert all(" … " in row["displaced"]["interval"] for row in found["near"])
    assert {row["kept"] for row in found["rows"][:5]} == {"20"}
    assert all(row["teaches"] for row in found["rows"][:-1])
    assert [row["name"] for row in found["near"][:2]] == ["a", "b"]
    assert len(found["scatters"]) == 4
    assert "<svg" in found["overlap"]


def test_pairs_of_one_prompt_have_no_section() -> None:
    assert training_set(aligned(80, prompts=["same"] * 80)) is None


@pytest.mark.parametrize(("pairs", "spread"), [(20, 3.0), (80, 0.0)])
def test_too_few_pairs_or_policies_that_move_nothing_have_no_section(pairs: int, spread: float) -> None:
    assert training_set(aligned(pairs, spread)) is None
