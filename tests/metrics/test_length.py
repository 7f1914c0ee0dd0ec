"""Length: a policy that only counts tokens is found out, one that does not is left alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dpo_score.metrics.intervals import wilson
from dpo_score.metrics.length import (
    length_baselines,
    length_controlled_accuracy,
    logistic_regression,
    pearson,
    ranks,
    spearman,
)
from dpo_score.metrics.student import t_quantile


def lengths(n: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Chosen answers are 40 tokens longer on average."""
    rng = np.random.default_rng(seed)
    return rng.integers(40, 240, n) * 1.0, rng.integers(0, 200, n) * 1.0, rng


def test_baselines_are_complements_without_equal_lengths() -> None:
    found = length_baselines(np.array([3.0, 5.0, 2.0, 4.0]), np.array([2.0, 1.0, 7.0, 4.0]))
    assert found["longer_wins"].value == pytest.approx(2 / 3)
    assert found["shorter_wins"].value == pytest.approx(1 / 3)


def test_a_policy_that_prefers_length_alone_has_no_accuracy_at_equal_length() -> None:
    chosen, rejected, rng = lengths()
    margin = (chosen - rejected) / 50 + rng.logistic(size=len(chosen))
    raw = float(np.mean(margin > 0))
    found = length_controlled_accuracy(margin, chosen, rejected)
    assert raw > 0.6
    assert found.low < 0.5 < found.high
    assert found.slope > 1


def test_a_policy_blind_to_length_keeps_its_accuracy() -> None:
    chosen, rejected, rng = lengths()
    margin = 1.0 + rng.logistic(size=len(chosen))
    found = length_controlled_accuracy(margin, chosen, rejected)
    assert found.accuracy == pytest.approx(1 / (1 + math.exp(-1)), abs=0.02)
    assert found.low < 1 / (1 + math.exp(-1)) < found.high


def test_repeated_pairs_do_not_narrow_the_interval() -> None:
    chosen, rejected, rng = lengths(200)
    margin = 0.5 + rng.logistic(size=200)
    once = length_controlled_accuracy(margin, chosen, rejected)
    tiled = [np.tile(x, 4) for x in (margin, chosen, rejected, np.arange(200))]
    four = length_controlled_accuracy(*tiled)
    assert four.high - four.low == pytest.approx(once.high - once.low, rel=0.02)


def test_few_or_separable_pairs() -> None:
    assert length_controlled_accuracy(np.ones(9), np.ones(9), np.zeros(9)).reason is not None
    separable = length_controlled_accuracy(np.ones(50), np.ones(50), np.ones(50))
    assert 0.9 < separable.accuracy <= 1.0
    assert math.isfinite(separable.low)


@pytest.mark.parametrize(("right", "n"), [(50, 50), (12, 12), (40, 50), (1, 30)])
def test_at_equal_lengths_throughout_the_interval_is_wilsons(right: int, n: int) -> None:
    margin = np.repeat([1.0, -1.0], [right, n - right])
    found = length_controlled_accuracy(margin, np.ones(n), np.ones(n))
    expected = wilson(right, n, t_quantile(0.975, n - 1))
    assert (found.low, found.high) == (pytest.approx(expected[0], abs=1e-3), pytest.approx(expected[1], abs=1e-3))


def test_all_right_is_not_certain() -> None:
    rng = np.random.default_rng(3)
    chosen, rejected = rng.integers(20, 200, (2, 140)) * 1.0
    found = length_controlled_accuracy(np.ones(140), chosen, rejected)
    assert found.low == pytest.approx(wilson(140, 140)[0], abs=2e-3)
    assert found.high == pytest.approx(1.0)
    longer = length_controlled_accuracy(np.ones(140), rejected + 50, rejected)
    assert longer.low < 0.5, "no pair says what happens at equal length"


def test_pairs_of_one_prompt_have_no_interval() -> None:
    found = length_controlled_accuracy(np.ones(12), np.arange(12.0), np.ones(12), np.zeros(12))
    assert (found.low, found.high) == (None, None)
    assert found.accuracy is not None
    assert "one prompt" in str(found.reason)


def test_prompts_that_were_all_right_count_once_each() -> None:
    copies = length_controlled_accuracy(np.ones(60), np.ones(60), np.ones(60), np.repeat(np.arange(12), 5))
    assert copies.low == pytest.approx(wilson(12, 12, t_quantile(0.975, 11))[0], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("log_odds", "slope", "n"), [(3.9, 0.0, 140), (2.2, 1.0, 140), (0.4, 1.0, 60)])
def test_the_interval_at_equal_length_covers(log_odds: float, slope: float, n: int) -> None:
    """98 %, 90 % and 60 % right: errors of the log-odds alone would cover 83 % of the first."""
    rng, hits = np.random.default_rng(4), 0
    truth = 1.0 / (1.0 + math.exp(-log_odds))
    for _ in range(250):
        chosen, rejected = rng.integers(40, 240, n) * 1.0, rng.integers(20, 220, n) * 1.0
        gap = chosen - rejected
        feature = np.tanh(gap / math.sqrt(float(np.mean(gap * gap))))
        right = rng.random(n) < 1.0 / (1.0 + np.exp(-log_odds - slope * feature))
        found = length_controlled_accuracy(np.where(right, 1.0, -1.0), chosen, rejected)
        hits += found.low <= truth <= found.high
    assert hits / 250 >= 0.92


def test_correlations_by_hand() -> None:
    x, y = np.array([1.0, 2.0, 3.0, math.nan]), np.array([2.0, 4.0, 6.0, 1.0])
    assert pearson(x, y) == 1.0
    assert pearson(x, -y) == -1.0
    assert spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 8.0, 27.0, 64.0])) == 1.0
    assert pearson(np.ones(3), np.arange(3.0)) is None
    assert ranks(np.array([5.0, 1.0, 5.0])).tolist() == [2.5, 1.0, 2.5]


def test_scipy_agrees_on_correlations() -> None:
    x, y = np.random.default_rng(1).integers(0, 9, (2, 60)) * 1.0
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_logistic_regression_recovers_its_coefficients() -> None:
    rng = np.random.default_rng(2)
    design = np.stack([np.ones(20_000), rng.normal(size=20_000)], axis=1)
    outcome = (rng.random(20_000) < 1 / (1 + np.exp(-(0.4 - 0.8 * design[:, 1])))) * 1.0
    weights, covariance = logistic_regression(design, outcome)
    error = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(weights - [0.4, -0.8]) < 4 * error)
    assert error == pytest.approx([0.015, 0.017], abs=0.005)
