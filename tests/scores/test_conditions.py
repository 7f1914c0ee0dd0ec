"""The grammar of --fail-if: what is understood, what is refused, and when a gate fires."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_score.errors import ConfigError
from dpo_score.scores.conditions import (
    OPERATORS,
    Quantity,
    Test,
    firing,
    mean_bounds,
    parse_condition,
    share_bounds,
)
from dpo_score.scores.lineup import METRICS, line_up
from tests.scores.scored import SETTINGS, policies, scored


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("accuracy.low < 0.6", Test(Quantity("accuracy", bound="low"), "<", 0.6)),
        ("accuracy.low<60%", Test(Quantity("accuracy", bound="low"), "<", 0.6)),
        ("diff.accuracy.high < 0", Test(Quantity("accuracy", True, None, "high"), "<", 0.0)),
        ("accuracy[math] >= -1e-3", Test(Quantity("accuracy", False, "math"), ">=", -1e-3)),
        ("accuracy.low[math] < 1", Test(Quantity("accuracy", False, "math", "low"), "<", 1.0)),
        ('loss["a.b and c]"].high > 2', Test(Quantity("loss", False, "a.b and c]", "high"), ">", 2.0)),
        ("diff.margins[worst_subset].p <= .05", Test(Quantity("margins", True, "worst_subset", "p"), "<=", 0.05)),
        ("margins < baseline", Test(Quantity("margins"), "<", "value")),
        ("margins.high < baseline.low", Test(Quantity("margins", bound="high"), "<", "low")),
    ],
)
def test_what_is_understood(text: str, expected: Test) -> None:
    assert parse_condition(text) == ((expected,),)


def test_or_binds_weaker_than_and() -> None:
    condition = parse_condition("loss > 1 and loss > 2 or accuracy < 3")
    assert [[test.right for test in group] for group in condition] == [[1.0, 2.0], [3.0]]


quantities = st.builds(
    Quantity, st.sampled_from(sorted(METRICS)), st.booleans(), st.sampled_from([None, "math"]), st.just("low")
)


@given(quantities, st.sampled_from(sorted(OPERATORS)), st.floats(-10, 10))
def test_what_is_written_is_read_back(quantity: Quantity, op: str, number: float) -> None:
    assert parse_condition(f"{quantity} {op} {number!r}") == ((Test(quantity, op, number),),)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("acuracy < 1", "accuracy"),
        ("accuracy.lo < 1", "low"),
        ("accuracy.p < 1", "bound"),
        ("accuracy", "QUANTITY < NUMBER"),
        ("accuracy < much", "neither a number"),
        ("diff.accuracy < baseline", "already against"),
        ("accuracy + 1 < 2", "form"),
        ("", "QUANTITY"),
    ],
)
def test_what_is_refused_names_the_way_out(text: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        parse_condition(text)


def fired(text: str, **kwargs: object) -> list[str]:
    lineup = line_up(policies(1, 300, {"old": 0.3, "new": -0.3}))
    return firing(parse_condition(text), lineup, "old")


@pytest.mark.parametrize(
    ("text", "fires"),
    [
        ("diff.accuracy.high < 0", True),
        ("diff.accuracy.low > 0", False),
        ("diff.accuracy.p < 0.01 and accuracy < baseline", True),
        ("accuracy[subset 1].high < 0.1", False),
        ("accuracy[worst_subset] < 0.55 or loss > 100", True),
        ("loss > baseline", True),
    ],
)
def test_a_gate_fires_for_the_other_policy_when_it_should(text: str, fires: bool) -> None:
    found = fired(text)
    assert bool(found) is fires
    assert all(sentence.startswith("new: ") for sentence in found)


def test_the_worst_subset_is_named() -> None:
    assert "(subset" in fired("accuracy[worst_subset] < 0.9")[0]


def test_what_cannot_be_had_is_an_error_not_a_pass() -> None:
    with pytest.raises(ConfigError, match="no subset"):
        fired("accuracy[nowhere] < 1")
    unlike = line_up([scored("a", [1, 2]), scored("b", [1, 2], settings=replace(SETTINGS, reference="other"))])
    with pytest.raises(ConfigError, match="not subtracted"):
        firing(parse_condition("diff.margins < 0"), unlike, "a")
    with pytest.raises(ConfigError, match="fewer than two"):
        firing(parse_condition("margins.low < 0"), line_up([scored("a", [1.0])]), None)
    with pytest.raises(ConfigError, match="no subset"):
        firing(parse_condition("accuracy[worst_subset] < 1"), line_up([scored("a", [1.0, 2.0])]), None)


def test_more_intervals_at_once_are_wider() -> None:
    draw = np.random.default_rng(0)
    outcomes, labels = (draw.random(60) < 0.7) * 1.0, np.arange(60)
    for bounds in (share_bounds, mean_bounds):
        for clusters in (labels, labels // 3):
            (low1, high1), (low9, high9) = bounds(outcomes, clusters, 1), bounds(outcomes, clusters, 9)
            assert low9 < low1 < high1 < high9


def test_many_equal_subsets_do_not_fire_the_gate_on_noise() -> None:
    """20 subsets at exactly 50 %: the gate "worst subset below chance" fires in at most about 5 % of repetitions."""
    condition = parse_condition("accuracy[worst_subset].high < 0.5")
    names = [f"s{i % 20}" for i in range(600)]
    draw = np.random.default_rng(5)
    fires = [
        bool(firing(condition, line_up([scored("a", draw.choice([-1.0, 1.0], 600), subsets=names)]), None))
        for _ in range(120)
    ]
    assert sum(fires) <= 12


def test_a_group_of_a_slice_can_be_named() -> None:
    columns = {"depth": list(range(40)), "lang": ["a]b", "c"] * 20}
    lineup = line_up([scored("one", [-1.0] * 20 + [1.0] * 20, slices=columns)])
    assert firing(parse_condition("accuracy[depth=0 to 9] < 0.5"), lineup, None)
    assert not firing(parse_condition("accuracy[depth=30 to 39] < 0.5"), lineup, None)
    assert firing(parse_condition('accuracy["lang=a]b"].high < 0.9'), lineup, None)
    with pytest.raises(ConfigError, match="depth=0 to 9"):
        firing(parse_condition("accuracy[depth=0 to 8] < 0.5"), lineup, None)
