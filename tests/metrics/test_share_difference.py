"""Differences of shares: by the pairs that flipped, however few, and of prompts that repeat."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpo_score.metrics.intervals import normal_quantile, t_quantile, tango
from dpo_score.metrics.paired_tests import differences_to, differences_to_best, mcnemar, mcnemar_mid, share_difference

NAN = math.nan


def test_the_mid_p_counts_half_of_what_was_seen() -> None:
    assert mcnemar_mid(1, 7) == pytest.approx(0.0391, abs=5e-5), "Fagerland, Lydersen and Laake 2013"
    assert mcnemar_mid(0, 0) == mcnemar_mid(7, 7) == 1.0
    for won, lost in ((0, 3), (3, 9), (500, 560), (20_000, 20_400)):
        likely = stats.binom(won + lost, 0.5)
        assert mcnemar_mid(won, lost) == pytest.approx(2 * likely.cdf(won) - likely.pmf(won), rel=1e-8)
        assert mcnemar_mid(won, lost) < mcnemar(won, lost)


def flipped(won: int, lost: int, same: int) -> tuple[np.ndarray, np.ndarray]:
    """0/1 outcomes of two policies."""
    return np.repeat([1.0, 0.0, 1.0], [won, lost, same]), np.repeat([0.0, 1.0, 1.0], [won, lost, same])


def test_a_difference_of_shares_by_hand() -> None:
    a, b = flipped(1, 7, 13)
    found = share_difference(np.append(a, NAN), np.append(b, 1.0))
    assert (found.n, found.mean, found.method) == (21, pytest.approx(-6 / 21), "Tango")
    assert (found.low, found.high) == tango(1, 7, 21, normal_quantile(0.975))
    assert found.p == mcnemar_mid(1, 7)
    z = normal_quantile(0.975) + normal_quantile(0.8)
    assert found.detectable == pytest.approx(z * math.sqrt(8) / 21)


def test_a_few_pairs_all_lost_are_not_certain() -> None:
    for n in (1, 2, 3):
        found = share_difference(*flipped(0, n, 0))
        assert (found.mean, found.low) == (-1.0, -1.0)
        assert found.high > 0.0
        assert found.p == pytest.approx(0.5**n)
        assert found.detectable is None
        assert "so few pairs" in str(found.reason)


def test_equal_rankings_still_leave_room_for_a_difference() -> None:
    found = share_difference(*flipped(0, 0, 140))
    assert (found.mean, found.p) == (0.0, 1.0)
    assert -found.low == pytest.approx(found.high) == pytest.approx(0.0267, abs=1e-4)
    assert found.detectable == pytest.approx(0.0561, abs=1e-4), "some eight pairs must flip, and all one way"


def test_shares_of_nothing_and_of_one_prompt_say_why() -> None:
    nothing = share_difference(np.array([NAN, 1.0]), np.array([1.0, NAN]))
    assert (nothing.n, nothing.mean, nothing.low, nothing.reason) == (0, None, None, "no pair that both sides rank")
    one = share_difference(*flipped(0, 3, 0), np.zeros(3))
    assert (one.mean, one.low, one.p) == (-1.0, None, None)
    assert one.reason is not None


def test_copied_pairs_do_not_make_a_difference_of_shares_surer() -> None:
    a, b = flipped(4, 12, 60)
    once = share_difference(a, b)
    four = share_difference(np.tile(a, 4), np.tile(b, 4), np.tile(np.arange(76), 4))
    assert four.method == "cluster-robust Tango"
    assert four.mean == once.mean
    assert four.high - four.low == pytest.approx(once.high - once.low, rel=0.03)
    assert four.p == pytest.approx(once.p, abs=0.02)
    assert four.detectable == pytest.approx(once.detectable, rel=0.03)


def test_prompts_that_were_all_lost_count_once_each() -> None:
    found = share_difference(*flipped(0, 9, 0), np.repeat(np.arange(3), 3))
    assert (found.low, found.high) == tango(0, 3, 3, t_quantile(0.975, 2))
    assert found.p > 0.2
    none = share_difference(*flipped(0, 0, 12), np.repeat(np.arange(4), 3))
    assert (none.low, none.high) == tango(0, 0, 4, t_quantile(0.975, 3))
    assert none.p == 1.0


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 200), st.sampled_from([0.9, 0.95, 0.99]))
def test_interval_and_p_of_shares_never_contradict_each_other(won: int, lost: int, same: int, level: float) -> None:
    if not won + lost + same:
        return
    found = share_difference(*flipped(won, lost, same), level=level)
    assert (found.low > 0.0 or found.high < 0.0) == (found.p < 1.0 - level)


def test_four_flips_of_one_kind_are_not_told_from_none() -> None:
    found = share_difference(*flipped(4, 0, 0))
    assert (found.p, found.low) == (0.0625, 0.0)


def test_few_and_rare_flips_are_covered() -> None:
    """140 pairs of which 1.5 % are won and 0.5 % lost: a t interval covers 87.5 %."""
    draw, hits = np.random.default_rng(8), 0
    for _ in range(1000):
        u = draw.random(140)
        a, b = (u < 0.015) * 1.0, (u > 0.995) * 1.0
        found = share_difference(a, b)
        hits += found.low <= 0.01 <= found.high
    assert 0.93 <= hits / 1000 <= 0.995


@pytest.mark.slow
def test_thirty_policies_of_equal_accuracy_raise_few_false_alarms() -> None:
    rng = np.random.default_rng(10)
    alarms_best = alarms_baseline = 0
    for _ in range(500):
        right = rng.random(140) < 0.8
        values = {f"p{k}": np.where(rng.random(140) < 0.2, ~right, right) * 1.0 for k in range(30)}
        alarms_best += any(not item.tied for item in differences_to_best(values, differ=share_difference))
        alarms_baseline += any(not item.tied for item in differences_to("p0", values, differ=share_difference))
    assert alarms_best / 500 <= 0.06
    assert alarms_baseline / 500 <= 0.06


@pytest.mark.slow
@pytest.mark.parametrize(("won", "lost", "prompts"), [(0.1, 0.06, None), (0.1, 0.1, 100), (0.3, 0.2, 60)])
def test_intervals_of_differences_of_shares_cover(won: float, lost: float, prompts: int | None) -> None:
    """Where prompts repeat, half of the pairs take the outcome of their prompt."""
    rng, hits = np.random.default_rng(11), 0
    for _ in range(2000):
        clusters = None if prompts is None else np.repeat(np.arange(prompts), rng.integers(1, 6, prompts))
        u = rng.random(140 if clusters is None else len(clusters))
        if clusters is not None:
            u = np.where(rng.random(len(u)) < 0.5, rng.random(len(u))[clusters], u)
        found = share_difference((u < won) * 1.0, (u > 1.0 - lost) * 1.0, clusters)
        hits += found.low <= won - lost <= found.high
    assert 0.93 <= hits / 2000 <= 0.97


@pytest.mark.parametrize(("n", "flips"), [(140, 3), (140, 14), (500, 50)])
def test_the_detectable_difference_of_shares_is_found_as_often_as_promised(n: int, flips: int) -> None:
    delta = share_difference(*flipped(flips, 0, n - flips)).detectable
    either = max(flips / n, delta)
    rng = np.random.default_rng(12)
    drawn = rng.multinomial(n, [(either + delta) / 2, (either - delta) / 2, 1 - either], 2000)
    assert np.mean([mcnemar_mid(int(won), int(lost)) < 0.05 for won, lost, _ in drawn]) >= 0.78
