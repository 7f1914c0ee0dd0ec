"""The grammar of --fail-if: what is understood, what is refused, and when a gate fires."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_score.errors import ConfigError
from dpo_score.metrics.compare import METRICS, AlignedPolicies, align_policies
from dpo_score.metrics.gate import (
    OPERATORS,
    Quantity,
    Test,
    estimate,
    failed_conditions,
    gate_notes,
    parse_condition,
)
from tests.metrics.scored import SETTINGS, policies, scored


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
        ("accuracy.low < nan", "finite"),
        ("margins > 1e999", "finite"),
        ("loss > -inf", "finite"),
        ("accuracy < nan%", "finite"),
    ],
)
def test_what_is_refused_names_the_way_out(text: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        parse_condition(text)


def fired(text: str, **kwargs: object) -> list[str]:
    aligned = align_policies(policies(1, 300, {"old": 0.3, "new": -0.3}))
    return failed_conditions(parse_condition(text), aligned, "old")


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
    unlike = align_policies([scored("a", [1, 2]), scored("b", [1, 2], settings=replace(SETTINGS, reference="other"))])
    with pytest.raises(ConfigError, match="not subtracted"):
        failed_conditions(parse_condition("diff.margins < 0"), unlike, "a")
    with pytest.raises(ConfigError, match="fewer than two"):
        failed_conditions(parse_condition("margins.low < 0"), align_policies([scored("a", [1.0])]), None)
    with pytest.raises(ConfigError, match="no subset"):
        failed_conditions(
            parse_condition("accuracy[worst_subset] < 1"), align_policies([scored("a", [1.0, 2.0])]), None
        )


def test_a_gate_that_nobody_stands_before_is_an_error() -> None:
    with pytest.raises(ConfigError, match="none is left to test; name others with --policies"):
        failed_conditions(parse_condition("accuracy < 0.99"), align_policies([scored("a", [1.0, -1.0])]), "a")


@pytest.mark.parametrize("metric", ["accuracy", "margins"])
@pytest.mark.parametrize("sides", [1, 2])
def test_more_intervals_at_once_are_wider(metric: str, sides: int) -> None:
    draw = np.random.default_rng(0)
    outcomes, labels = [(draw.random(60) < share) * 1.0 for share in (0.7, 0.6)][:sides], np.arange(60)
    for clusters in (labels, labels // 3):
        one, nine = (estimate(metric, outcomes, clusters, tests) for tests in (1, 9))
        assert nine.low < one.low < one.high < nine.high
        assert one.p is None or one.p < nine.p <= 1.0


def test_many_equal_subsets_do_not_fire_the_gate_on_noise() -> None:
    """20 subsets at exactly 50 %: the gate "worst subset below chance" fires in at most about 5 % of repetitions."""
    condition = parse_condition("accuracy[worst_subset].high < 0.5")
    names = [f"s{i % 20}" for i in range(600)]
    draw = np.random.default_rng(5)
    fires = [
        bool(
            failed_conditions(
                condition, align_policies([scored("a", draw.choice([-1.0, 1.0], 600), subsets=names)]), None
            )
        )
        for _ in range(120)
    ]
    assert sum(fires) <= 12


def equal_policies(draw: np.random.Generator, subsets: int, size: int, prompts: list[str] | None) -> AlignedPolicies:
    """Two policies, each 72 % right by turning a fifth of the same outcomes; neither is better anywhere."""
    n = subsets * size
    names, right = [f"s{i // size}" for i in range(n)], draw.random(n) < 0.75
    turned = [np.where(draw.random(n) < 0.2, ~right, right) for _ in range(2)]
    return align_policies(
        [
            scored(name, np.where(one, 1.0, -1.0), subsets=names, prompts=prompts)
            for name, one in zip(("old", "new"), turned, strict=True)
        ]
    )


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(("subsets", "size"), [(20, 3), (50, 3), (20, 30)])
def test_the_worst_of_many_subsets_raises_no_alarm_between_equal_policies(
    subsets: int, size: int, clustered: bool
) -> None:
    """An interval of no width around three lost pairs of three would fire in one repetition of eight."""
    condition, draw = parse_condition("diff.accuracy[worst_subset].high < 0"), np.random.default_rng(7)
    prompts = [f"prompt {i // 2}" for i in range(subsets * size)] if clustered else None
    sets = (equal_policies(draw, subsets, size, prompts) for _ in range(100))
    assert sum(bool(failed_conditions(condition, aligned, "old")) for aligned in sets) <= 5


def test_three_lost_pairs_are_not_certain() -> None:
    names = ["s"] * 3 + ["t"] * 40
    aligned = align_policies(
        [scored("old", [1.0] * 43, subsets=names), scored("new", [-1.0] * 3 + [1.0] * 40, subsets=names)]
    )
    for text in ("diff.accuracy[s].high < 0", "diff.accuracy[s].p < 0.1", "diff.accuracy[worst_subset].high < 0"):
        assert not failed_conditions(parse_condition(text), aligned, "old")
    assert failed_conditions(parse_condition("diff.accuracy[s] <= -1"), aligned, "old")


@pytest.mark.parametrize("bound", ["high < 0", "p < 0.05"])
def test_a_small_subset_does_not_hide_a_large_one_that_is_worse(bound: str) -> None:
    names = ["small"] * 2 + ["large"] * 100
    new = [-1.0] * 2 + [-1.0] * 30 + [1.0] * 70
    aligned = align_policies([scored("old", [1.0] * 102, subsets=names), scored("new", new, subsets=names)])
    assert "(large)" in failed_conditions(parse_condition(f"diff.accuracy[worst_subset].{bound}"), aligned, "old")[0]
    assert "(small)" in failed_conditions(parse_condition("diff.accuracy[worst_subset] < 0"), aligned, "old")[0]


def test_differences_without_spread_are_an_error_not_certainty() -> None:
    names = ["s"] * 2 + ["t"] * 2
    aligned = align_policies([scored("old", [1.0, 2.0, 3.0, 4.0], subsets=names), scored("new", [0.0, 1.0, 3.5, 5.0])])
    with pytest.raises(ConfigError, match="no spread"):
        failed_conditions(parse_condition("diff.margins_nats[s].high < 0"), aligned, "old")
    assert not failed_conditions(parse_condition("diff.margins_nats[worst_subset].high < 0"), aligned, "old")


def test_a_subset_of_one_prompt_is_not_picked_as_the_worst() -> None:
    names, prompts = ["one"] * 3 + ["many"] * 40, ["p"] * 3 + [f"q{i // 2}" for i in range(40)]
    made = scored("a", [-1.0] * 3 + [1.0, -1.0] * 20, subsets=names, prompts=prompts)
    assert (
        "(many)"
        in failed_conditions(parse_condition("accuracy[worst_subset].low < 0.5"), align_policies([made]), None)[0]
    )
    only = scored("a", [-1.0] * 3, subsets=["one"] * 3, prompts=["p"] * 3)
    with pytest.raises(ConfigError, match="all pairs belong to one prompt"):
        failed_conditions(parse_condition("accuracy[worst_subset].low < 0.5"), align_policies([only]), None)


def test_a_group_of_a_slice_can_be_named() -> None:
    columns = {"depth": list(range(40)), "lang": ["a]b", "c"] * 20}
    aligned = align_policies([scored("one", [-1.0] * 20 + [1.0] * 20, slices=columns)])
    assert failed_conditions(parse_condition("accuracy[depth=0 to 9] < 0.5"), aligned, None)
    assert not failed_conditions(parse_condition("accuracy[depth=30 to 39] < 0.5"), aligned, None)
    assert failed_conditions(parse_condition('accuracy["lang=a]b"].high < 0.9'), aligned, None)
    with pytest.raises(ConfigError, match="depth=0 to 9"):
        failed_conditions(parse_condition("accuracy[depth=0 to 8] < 0.5"), aligned, None)


def test_a_claim_about_many_policies_is_adjusted_for_their_number_and_a_proof_is_not() -> None:
    base = np.repeat([1.0, -1.0], [140, 60])
    worse = np.where(np.arange(200) < 22, -base, base)
    worse[150:163] = 1.0
    pair = [scored("old", base), scored("new", worse)]
    many = [*pair, *(scored(f"same {i}", base) for i in range(11))]
    claim, proof = parse_condition("diff.accuracy.high < 0"), parse_condition("diff.accuracy.low < -0.083")
    assert [bool(failed_conditions(claim, align_policies(made), "old")) for made in (pair, many)] == [False, False]
    high = [
        estimate("accuracy", [(x > 0) * 1.0 for x in (worse, base)], np.arange(200), tests).high for tests in (1, 12)
    ]
    assert high[0] < high[1]
    for made in (pair, many):
        line = f"diff.accuracy.high < {high[0] + 1e-9}"
        assert bool(failed_conditions(parse_condition(line), align_policies(made), "old")) is (made is pair)
    assert (
        failed_conditions(proof, align_policies(pair), "old")
        == failed_conditions(proof, align_policies(many), "old")[:1]
    )


@pytest.mark.parametrize(
    ("text", "careful"),
    [
        ("accuracy[worst_subset] < 0.6", "accuracy[worst_subset].high < 0.6"),
        ("diff.accuracy[worst_subset] < 0", "diff.accuracy[worst_subset].high < 0"),
        ("loss[worst_subset] > baseline", "loss[worst_subset].low > baseline"),
    ],
)
def test_a_bare_number_of_the_worst_subset_is_said_to_ignore_noise(text: str, careful: str) -> None:
    (note,) = gate_notes(parse_condition(text))
    assert "ignores noise" in note
    assert f"`{careful}`" in note
    assert parse_condition(careful)
    assert gate_notes(parse_condition(careful)) == []
    assert gate_notes(parse_condition("accuracy < 0.6")) == []
