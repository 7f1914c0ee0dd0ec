"""Paired comparison: the textbook tests, Holm's adjustment, joins that never mix pairs, and calm on noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpo_score.metrics.intervals import MeanTest, t_quantile
from dpo_score.metrics.paired_tests import (
    best_policy,
    detectable_difference,
    differences_to,
    differences_to_best,
    flips,
    holm,
    mcnemar,
    paired_difference,
)

NAN = math.nan


def test_a_paired_difference_by_hand() -> None:
    found = paired_difference(np.array([2.0, 4.0, 6.0, NAN]), np.array([1.0, 2.0, 6.0, 0.0]))
    assert (found.n, found.mean, found.method) == (3, 1.0, "paired t")
    error = 1.0 / math.sqrt(3)
    assert (found.low, found.high) == (
        pytest.approx(1 - t_quantile(0.975, 2) * error),
        pytest.approx(1 + t_quantile(0.975, 2) * error),
    )
    assert found.detectable == pytest.approx((t_quantile(0.975, 2) + t_quantile(0.8, 2)) * error * (1 + 1 / 6))


def test_equal_policies_differ_by_exactly_nothing() -> None:
    values = np.random.default_rng(0).normal(size=20)
    found = paired_difference(values, values)
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert found.detectable is None
    assert "equal on every pair" in str(found.reason)


def test_the_same_difference_on_every_pair_is_not_certain() -> None:
    found = paired_difference(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
    assert (found.mean, found.low, found.high, found.p, found.detectable) == (-1.0, None, None, None, None)
    assert "no spread" in str(found.reason)
    turned = paired_difference(np.tile([0.0, 1.0, 1.0], 4), np.ones(12), np.repeat(np.arange(4), 3))
    assert (turned.low, turned.p) == (None, None)


def test_too_few_pairs_have_no_interval_and_say_why() -> None:
    found = paired_difference(np.array([1.0, NAN]), np.array([0.0, 1.0]))
    assert (found.n, found.mean, found.low, found.p) == (1, 1.0, None, None)
    assert found.reason is not None
    assert paired_difference(np.array([NAN]), np.array([1.0])).mean is None


def test_repeated_prompts_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    prompt = np.repeat(np.arange(30), 4)
    gain = rng.normal(0.2, 1, 30)[prompt]
    naive = paired_difference(gain, np.zeros(120))
    robust = paired_difference(gain, np.zeros(120), prompt)
    assert robust.method == "cluster-robust t"
    assert robust.high - robust.low > 1.8 * (naive.high - naive.low)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(values: list[float]) -> None:
    adjusted = holm(values)
    for p, q in zip(values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(values) * p) + 1e-12
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert all(adjusted[a] <= adjusted[b] for a, b in itertools.pairwise(order))


def test_mcnemar_by_hand() -> None:
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(7, 7) == 1.0
    assert mcnemar(600, 400) == mcnemar(400, 600) < 1e-9


def test_scipy_agrees_on_mcnemar_and_the_paired_t() -> None:
    for won, lost in ((3, 9), (30, 50), (500, 560)):
        assert mcnemar(won, lost) == pytest.approx(stats.binomtest(won, won + lost).pvalue, rel=1e-9)
    a, b = np.random.default_rng(2).normal(size=(2, 40))
    assert paired_difference(a, b).p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-8)


def test_flips_count_each_side_and_leave_ties_out() -> None:
    a, b = np.array([1.0, 1.0, 0.0, 0.0, NAN, 1.0]), np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    found = flips(a, b)
    assert (found.won, found.lost, found.both_right, found.both_wrong) == (2, 1, 1, 1)
    assert mcnemar(found.won, found.lost) == 1.0


def three_policies(seed: int = 3) -> dict[str, np.ndarray]:
    base = np.random.default_rng(seed).normal(size=400)
    noise = np.random.default_rng(seed + 1).normal(0, 0.1, size=(3, 400))
    return {"a": base + noise[0], "b": base + 1.0 + noise[1], "c": base + 1.0 + noise[2]}


def test_the_clearly_worse_policy_is_told_apart_and_the_equal_one_is_tied() -> None:
    found = {item.policy: item for item in differences_to_best(three_policies())}
    best = best_policy(three_policies())
    assert best in ("b", "c")
    other = ({"b", "c"} - {best}).pop()
    assert not found["a"].tied
    assert found[other].tied
    assert found["a"].difference.mean == pytest.approx(-1.0, abs=0.02)


def test_against_a_baseline_adjusts_over_all_others() -> None:
    found = differences_to("a", three_policies())
    assert [item.policy for item in found] == ["b", "c"]
    assert all(item.adjusted_p == pytest.approx(0.0, abs=1e-12) and not item.tied for item in found)


def test_holm_runs_over_the_p_values_that_there_are() -> None:
    base, flat = np.zeros(40), np.ones(40)
    noise = np.random.default_rng(9).normal(0.5, 1.0, 40)
    found = {item.policy: item for item in differences_to("base", {"base": base, "flat": flat, "noise": noise})}
    assert found["flat"].adjusted_p is None
    assert found["flat"].tied
    assert found["noise"].adjusted_p == found["noise"].difference.p


def test_one_policy_has_nothing_to_be_compared_with() -> None:
    assert differences_to_best({"only": np.array([1.0, 2.0])}) == []


def test_the_detectable_difference_is_found_as_often_as_promised() -> None:
    """At the smallest detectable difference a 5 % test rejects in 80 % of samples, by definition."""
    rng = np.random.default_rng(4)
    shift = detectable_difference(MeanTest(0.0, 1.0 / math.sqrt(50), 49, 1.0))
    found = [paired_difference(rng.normal(shift, 1.0, 50), np.zeros(50)).p for _ in range(1000)]
    assert np.mean([p < 0.05 for p in found if p is not None]) == pytest.approx(0.8, abs=0.04)


@pytest.mark.slow
def test_thirty_equal_policies_raise_few_false_alarms() -> None:
    """Family-wise: a repetition counts when any policy is called different from the best, or from a baseline."""
    rng = np.random.default_rng(5)
    alarms_best = alarms_baseline = 0
    repetitions = 1000
    for _ in range(repetitions):
        common = rng.normal(size=200)
        values = {f"p{k}": common + rng.normal(0.0, 0.5, 200) for k in range(30)}
        alarms_best += any(not item.tied for item in differences_to_best(values))
        alarms_baseline += any(not item.tied for item in differences_to("p0", values))
    assert alarms_best / repetitions <= 0.06
    assert alarms_baseline / repetitions <= 0.06


@pytest.mark.slow
def test_intervals_of_paired_differences_cover() -> None:
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(2000):
        prompt = np.repeat(np.arange(60), rng.integers(1, 5, 60))
        shared, own = rng.normal(size=60)[prompt], rng.normal(0.3, 0.7, 60)[prompt]
        a, b = shared + own + rng.normal(size=len(prompt)), shared + rng.normal(size=len(prompt))
        found = paired_difference(a, b, prompt)
        hits += found.low <= 0.3 <= found.high
    assert 0.93 <= hits / 2000 <= 0.97
