"""Joining policies by pair, and which numbers may be subtracted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.metrics.compare import METRICS, line_up, refusal
from tests.metrics.scored import SETTINGS, scored


def test_the_k_th_occurrence_meets_the_k_th() -> None:
    a = scored("a", [1, 2, 3, 4], pair_ids=["x", "y", "x", "z"])
    b = scored("b", [5, 6, 7, 8], pair_ids=["x", "x", "x", "y"])
    lineup = line_up([a, b])
    assert lineup["a"].pair_ids == lineup["b"].pair_ids == ["x", "y", "x"]
    assert lineup.values("margins_nats")["a"].tolist() == [1, 2, 3]
    assert lineup.values("margins_nats")["b"].tolist() == [5, 8, 6]
    assert [(side.policy, side.pairs, side.first) for side in lineup.one_sided] == [
        ("a", 1, ("0:3",)),
        ("b", 1, ("0:2",)),
    ]


@given(st.lists(st.lists(st.sampled_from("pqr"), min_size=1, max_size=6), min_size=1, max_size=4))
@settings(deadline=None)
def test_joined_rows_hold_the_same_pairs_in_the_first_order(sides: list[list[str]]) -> None:
    policies = [scored(str(i), [0.0] * len(ids), pair_ids=ids) for i, ids in enumerate(sides)]
    counts = {pair: min(ids.count(pair) for ids in sides) for pair in "pqr"}
    if not any(counts.values()):
        with pytest.raises(ValueError, match="no pair"):
            line_up(policies)
        return
    lineup = line_up(policies)
    assert {tuple(policy.pair_ids) for policy in lineup.policies} == {tuple(lineup.first.pair_ids)}
    assert {pair: lineup.first.pair_ids.count(pair) for pair in "pqr"} == counts
    left_out = {side.policy: side.pairs for side in lineup.one_sided}
    assert all(len(ids) == len(lineup) + left_out.get(str(i), 0) for i, ids in enumerate(sides))


def test_accuracy_is_nothing_on_a_tie() -> None:
    values = line_up([scored("a", [1.0, 0.0, -1.0])]).values("accuracy")["a"]
    assert values[[0, 2]].tolist() == [1.0, 0.0]
    assert np.isnan(values[1])


@pytest.mark.parametrize("metric", METRICS)
def test_like_settings_may_be_subtracted(metric: str) -> None:
    assert refusal(SETTINGS, SETTINGS, metric) is None


@pytest.mark.parametrize(
    ("field", "refused"),
    [
        ("reference", {"margins", "margins_nats", "loss", "chosen_rewards", "rejected_rewards"}),
        ("template", {"margins", "margins_nats", "loss", "chosen_rewards", "rejected_rewards"}),
        ("truncation", {"margins", "margins_nats", "loss", "chosen_rewards", "rejected_rewards"}),
        ("dtype", {"margins", "margins_nats", "loss", "chosen_rewards", "rejected_rewards"}),
        ("beta", {"margins", "loss", "chosen_rewards", "rejected_rewards"}),
        ("loss", {"loss"}),
    ],
)
def test_unlike_settings_refuse_what_rests_on_them(field: str, refused: set[str]) -> None:
    other = replace(SETTINGS, **{field: 0.5 if field == "beta" else "other"})
    assert {metric for metric in METRICS if refusal(SETTINGS, other, metric)} == refused
