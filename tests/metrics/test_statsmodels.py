"""The same numbers from statsmodels: cluster-robust means and regressions, Holm, Wilson, McNemar."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from dpo_score.metrics.diagnostics import LogisticFit
from dpo_score.metrics.intervals import mean_interval, mean_test, wilson
from dpo_score.metrics.paired_tests import holm, mcnemar, paired_difference


def clustered(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """40 prompts with three pairs each, half of the variance the prompt's: CR1, which they have, equals CR2."""
    draw = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(40), 3)
    return 0.2 + draw.normal(size=40)[clusters] + draw.normal(size=len(clusters)), clusters


def test_a_cluster_robust_mean() -> None:
    values, clusters = clustered()
    fit = sm.OLS(values, np.ones_like(values)).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    found, interval = mean_test(values, clusters), mean_interval(values, clusters)
    assert found.error == pytest.approx(fit.bse[0], rel=1e-10)
    assert found.p == pytest.approx(fit.pvalues[0], rel=1e-8)
    assert [interval.low, interval.high] == pytest.approx(fit.conf_int()[0].tolist(), rel=1e-8)


def test_a_paired_difference_in_clusters() -> None:
    (a, clusters), (b, _) = clustered(1), clustered(1)
    b = b - 0.3 + np.random.default_rng(2).normal(size=len(b))
    fit = sm.OLS(a - b, np.ones_like(a)).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    found = paired_difference(a, b, clusters)
    assert found.p == pytest.approx(fit.pvalues[0], rel=1e-8)
    assert [found.low, found.high] == pytest.approx(fit.conf_int()[0].tolist(), rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_holm(seed: int) -> None:
    values = np.random.default_rng(seed).beta(0.4, 2.0, 12)
    assert holm(values.tolist()) == pytest.approx(multipletests(values, method="holm")[1].tolist(), rel=1e-12)


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 7), (70, 100), (41, 41)])
def test_wilson(right: int, n: int) -> None:
    assert wilson(right, n) == pytest.approx(proportion_confint(right, n, method="wilson"), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("won", "lost"), [(3, 9), (30, 50), (0, 4)])
def test_mcnemar(won: int, lost: int) -> None:
    expected = their_mcnemar([[5, won], [lost, 8]], exact=True).pvalue
    assert mcnemar(won, lost) == pytest.approx(expected, rel=1e-10)


def test_a_logistic_regression_with_clusters() -> None:
    _, clusters = clustered(3)
    draw = np.random.default_rng(4)
    length = draw.normal(size=len(clusters))
    outcome = (draw.random(len(clusters)) < 1.0 / (1.0 + np.exp(-0.4 - 0.8 * length))) * 1.0
    design = np.stack([np.ones_like(length), length], axis=1)
    fit = LogisticFit.of(length, outcome)
    theirs = sm.Logit(outcome, design).fit(disp=False, cov_type="cluster", cov_kwds={"groups": clusters})
    alone = sm.Logit(outcome, design).fit(disp=False, cov_type="HC0")
    assert [fit.intercept, fit.slope] == pytest.approx(theirs.params.tolist(), rel=1e-4)
    effect, _ = fit.design_effect(clusters)
    assert effect == pytest.approx(max(1.0, (theirs.bse[0] / alone.bse[0]) ** 2), rel=0.05)
