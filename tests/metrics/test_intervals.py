"""Intervals: textbook values without clusters, wider ones with them, coverage on data whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, optimize, stats

from dpo_score.metrics.intervals import (
    clopper_pearson,
    connected_clusters,
    deviation,
    mean,
    mean_interval,
    mean_test,
    normal_quantile,
    quantiles,
    repeats,
    share_interval,
    t_quantile,
    t_two_sided_p,
    tango,
    total,
    wilson,
)

REPETITIONS = 2000


def test_mean_is_exactly_rounded_whatever_the_order() -> None:
    values = np.array([1e16, 1.0, -1e16, 1.0] * 25)
    assert mean(values) == 0.5
    assert mean(np.random.default_rng(0).permutation(values)) == 0.5


def test_a_mean_without_clusters_is_the_textbook_interval() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    interval = mean_interval(values)
    half = t_quantile(0.975, 3) * np.std(values, ddof=1) / 2
    assert (interval.value, interval.method) == (4.0, "t")
    assert (interval.low, interval.high) == (pytest.approx(4 - half), pytest.approx(4 + half))
    assert deviation(values) == pytest.approx(np.std(values, ddof=1))


def test_clusters_of_one_change_nothing() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert mean_test(values, np.arange(30)) == mean_test(values)
    outcomes = (values > 0) * 1.0
    assert share_interval(outcomes, np.arange(30)) == share_interval(outcomes)


def test_copying_every_pair_does_not_make_us_surer() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, 40)
    once, copied = mean_interval(values), mean_interval(np.tile(values, 5), np.tile(np.arange(40), 5))
    assert copied.low == pytest.approx(once.low)
    assert copied.high == pytest.approx(once.high)
    assert copied.method == "cluster-robust t"
    naive = mean_interval(np.tile(values, 5))
    assert naive.high - naive.low < 0.5 * (once.high - once.low)


@pytest.mark.parametrize("exponent", [-1000, -360, -30, 0, 30, 500, 1000])
def test_the_unit_of_the_values_does_not_matter(exponent: int) -> None:
    """Losses of 1e-107, whose squares are next to nothing, are not a division by zero; no digit changes."""
    draw = np.random.default_rng(4)
    values, clusters = draw.lognormal(size=40), draw.geometric(0.2, 40)
    for labels in (None, clusters):
        plain, other = mean_test(values, labels), mean_test(np.ldexp(values, exponent), labels)
        assert plain.error is not None
        assert other.error == math.ldexp(plain.error, exponent) > 0.0
        assert (other.mean, other.df, other.p) == (math.ldexp(plain.mean, exponent), plain.df, plain.p)


def test_the_robust_error_by_hand() -> None:
    """Clusters {1, 2}, {3}, {6}: residual sums −3, 0, 3 around 3; Var = (9/(1 − 2/4) + 9/(1 − 1/4)) / 16."""
    test = mean_test(np.array([1.0, 2.0, 3.0, 6.0]), np.array(["a", "a", "b", "c"]))
    assert (test.mean, test.df) == (3.0, pytest.approx(1.8))
    assert test.error == pytest.approx(math.sqrt(30 / 16))


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [3, 3, 3], [5, 1, 2, 4], [40, 2, 2, 1], [1, 7]])
def test_the_robust_error_is_cr2_with_bell_mccaffrey_degrees_of_freedom(sizes: list[int]) -> None:
    """Written out with matrices: A_g = (I − H_gg)^(−½), df = (Σλ)²/Σλ² of the Gram matrix of Var's linear forms."""
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    values, n = np.random.default_rng(3).normal(size=len(clusters)), len(clusters)
    annihilator, variance, forms = np.eye(n) - np.full((n, n), 1 / n), 0.0, []
    for cluster in range(len(sizes)):
        inside = clusters == cluster
        root = linalg.fractional_matrix_power(annihilator[np.ix_(inside, inside)], -0.5)
        form = annihilator[:, inside] @ root @ np.ones(inside.sum()) / n
        forms.append(form)
        variance += float(form @ values) ** 2
    gram = np.array(forms) @ np.array(forms).T
    found = mean_test(values, clusters)
    assert found.error == pytest.approx(math.sqrt(variance))
    assert found.df == pytest.approx(np.trace(gram) ** 2 / np.trace(gram @ gram))


def test_wilson_by_hand_and_at_the_edges() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4901625), pytest.approx(0.9433178))
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0


def test_a_share_of_all_right_still_has_an_interval() -> None:
    clusters = np.repeat(np.arange(20), 3)
    interval = share_interval(np.ones(60), clusters)
    assert (interval.value, interval.high) == (1.0, 1.0)
    size = 20 * (normal_quantile(0.975) / t_quantile(0.975, 19)) ** 2
    assert interval.low == pytest.approx(0.025 ** (1 / size)), "all of so many are right in one case of forty"


def test_no_spread_is_not_certainty() -> None:
    lost = mean_test(np.array([-1.0, -1.0]))
    assert (lost.error, lost.p) == (0.0, None)
    assert mean_test(np.zeros(3)).p == 1.0
    prompts = np.repeat(np.arange(4), 3)
    alike = np.tile([-1.0, 0.0, 0.0], 4)  # residual sums of some 1e-17, not 0
    test = mean_test(alike, prompts)
    assert (test.error, test.p) == (0.0, None)
    interval = mean_interval(alike, prompts)
    assert (interval.low, interval.high) == (None, None)
    assert "no spread" in str(interval.reason)
    ln2 = mean_interval(np.full(7, math.log(2.0)))
    assert ln2.low == ln2.value == ln2.high, "a constant has its bounds: the loss of a policy that is the reference"


def test_clusters_that_are_all_alike_count_once_each() -> None:
    interval = share_interval(np.tile([1.0, 0.0, 0.0], 6), np.repeat(np.arange(6), 3))
    size = 6 * (normal_quantile(0.975) / t_quantile(0.975, 5)) ** 2
    right, wrong = size / 3, 2 * size / 3
    assert interval.low == pytest.approx(stats.beta.ppf(0.025, right, wrong + 1))
    assert interval.high == pytest.approx(stats.beta.ppf(0.975, right + 1, wrong))


def test_clopper_and_pearson_are_scipys_exact_interval() -> None:
    for right, n in ((0, 5), (3, 5), (5, 5), (61, 140)):
        exact = stats.binomtest(right, n).proportion_ci(method="exact")
        assert clopper_pearson(right, n) == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_few_clusters_that_carry_the_error_leave_fewer_degrees_of_freedom() -> None:
    """Of 40 uneven prompts all are right but two: the error rests on two, not on some thirty."""
    sizes = np.arange(40) % 5 + 1
    clusters = np.repeat(np.arange(40), sizes)
    wrong = np.isin(clusters, (4, 9))
    spread = np.random.default_rng(0).normal(size=len(clusters))
    assert mean_test((~wrong) * 1.0, clusters).df < 6
    assert mean_test(spread, clusters).df > 25
    assert mean_test((~wrong) * 1.0, np.repeat(np.arange(40), 3)[: len(clusters)]).df == 39


def test_another_level_is_another_width() -> None:
    outcomes = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    wide = share_interval(outcomes, level=0.99)
    assert (wide.low, wide.high) == wilson(4, 6, normal_quantile(0.995))
    assert mean_interval(outcomes, level=0.99).low < mean_interval(outcomes).low


def test_tango_by_hand_and_at_the_edges() -> None:
    """1 won and 7 lost of 21 pairs: Fagerland, Lydersen and Laake 2014. None of n: z²/(n + z²)."""
    z = normal_quantile(0.975)
    assert tango(1, 7, 21, z) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert tango(0, 0, 30, z) == pytest.approx((-z * z / (30 + z * z), z * z / (30 + z * z)))
    assert tango(0, 5, 5, z)[0] == -1.0
    assert tango(5, 0, 5, z)[1] == 1.0


@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 30))
def test_tango_turns_with_the_sides_and_holds_its_estimate(won: int, lost: int, same: int) -> None:
    n = won + lost + same
    if n == 0:
        return
    low, high = tango(won, lost, n, 1.96)
    back_low, back_high = tango(lost, won, n, 1.96)
    assert (low, high) == (pytest.approx(-back_high, abs=1e-9), pytest.approx(-back_low, abs=1e-9))
    assert -1.0 <= low <= (won - lost) / n <= high <= 1.0
    assert tango(won, lost, n, 3.0)[0] <= low


@pytest.mark.parametrize(("won", "lost", "n"), [(1, 7, 21), (3, 2, 40), (10, 25, 60)])
def test_tango_is_the_score_test_turned_round(won: int, lost: int, n: int) -> None:
    """At each bound the likeliest table with that difference lies z standard errors from what was seen."""
    for delta in tango(won, lost, n, 1.96):

        def unlikely(q: float, delta: float = delta) -> float:
            return -(won * math.log(q + delta) + lost * math.log(q) + (n - won - lost) * math.log(1 - 2 * q - delta))

        bounds = (max(0.0, -delta) + 1e-12, (1 - delta) / 2 - 1e-12)
        q = optimize.minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        score = (won - lost - n * delta) / math.sqrt(n * (2 * q + delta - delta * delta))
        assert abs(score) == pytest.approx(1.96, abs=1e-4)


def test_too_little_data_says_so() -> None:
    assert mean_interval(np.array([1.0])).reason is not None
    assert share_interval(np.ones(5), np.zeros(5)).reason == "all pairs belong to one prompt or group"
    assert math.isnan(share_interval(np.empty(0)).value)
    assert deviation(np.array([1.0])) is None
    assert quantiles(np.empty(0)) == {}


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_an_interval_holds_its_estimate_and_labels_do_not_matter(labels: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters, outcomes = np.array(labels), rng.integers(0, 2, len(labels)) * 1.0
    interval = share_interval(outcomes, clusters)
    if interval.low is not None:
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
        renamed = share_interval(outcomes, np.array([f"c{label}" for label in labels]))
        assert (renamed.low, renamed.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def slow_clusters(*labels: list[int]) -> list[set[int]]:
    """Merge groups of rows until no two share a label."""
    groups = [{row} for row in range(len(labels[0]))]
    for column in labels:
        for value in set(column):
            rows = {row for row, label in enumerate(column) if label == value}
            touched = [group for group in groups if group & rows]
            groups = [group for group in groups if not group & rows] + [set().union(*touched)]
    return groups


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=25))
def test_connected_clusters_equal_a_slow_twin(rows: list[tuple[int, int]]) -> None:
    first, second = ([row[k] for row in rows] for k in (0, 1))
    found = connected_clusters(np.array(first), np.array(second))
    groups = [set(np.flatnonzero(found == label)) for label in np.unique(found)]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, slow_clusters(first, second)))


def test_repeats() -> None:
    assert repeats(np.array([1, 2, 1]))
    assert not repeats(np.array([1, 2, 3]))
    assert not repeats(None)


def test_scipy_agrees_on_a_mean() -> None:
    values = np.random.default_rng(2).gamma(2.0, 1.0, 500)
    expected = stats.ttest_1samp(values, 0.0)
    assert mean_test(values).p == pytest.approx(expected.pvalue, rel=1e-8)
    interval = expected.confidence_interval(0.95)
    found = mean_interval(values)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_scipy_agrees_on_wilson() -> None:
    for k, n in ((0, 7), (3, 7), (70, 100)):
        expected = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == (pytest.approx(expected.low), pytest.approx(expected.high))


def coverage(
    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray | None]], truth: float, kind: str
) -> float:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(REPETITIONS):
        values, clusters = draw(rng)
        interval = (share_interval if kind == "share" else mean_interval)(values, clusters)
        hits += interval.low <= truth <= interval.high
    return hits / REPETITIONS


def clustered_margins(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """80 prompts with one to five pairs each; half of the variance belongs to the prompt. Mean 0.5."""
    clusters = np.repeat(np.arange(80), rng.integers(1, 6, 80))
    return 0.5 + rng.normal(size=80)[clusters] + rng.normal(size=len(clusters)), clusters


def clustered_outcomes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """100 prompts with one to five pairs; a prompt's own rate is Beta(3, 1.5). Mean ⅔."""
    clusters = np.repeat(np.arange(100), rng.integers(1, 6, 100))
    return (rng.random(len(clusters)) < rng.beta(3.0, 1.5, 100)[clusters]) * 1.0, clusters


@pytest.mark.slow
def test_95_percent_intervals_cover_the_truth() -> None:
    plain = coverage(lambda rng: (rng.normal(0.2, 1.0, 150), None), 0.2, "mean")
    skewed = coverage(lambda rng: (rng.gamma(2.0, 1.0, 150), None), 2.0, "mean")
    share = coverage(lambda rng: ((rng.random(150) < 0.7) * 1.0, None), 0.7, "share")
    means = coverage(clustered_margins, 0.5, "mean")
    shares = coverage(clustered_outcomes, 2 / 3, "share")
    found = {"mean": plain, "skewed": skewed, "share": share, "clustered mean": means, "clustered share": shares}
    assert all(0.93 <= value <= 0.97 for value in found.values()), found


@pytest.mark.slow
def test_ignoring_clusters_would_not_cover() -> None:
    naive = coverage(lambda rng: (clustered_margins(rng)[0], None), 0.5, "mean")
    assert naive < 0.90


def test_one_degree_of_freedom_is_cauchy() -> None:
    for t in (0.1, 1.0, 12.7, 1e6):
        assert t_two_sided_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-8)


def test_two_degrees_of_freedom_in_closed_form() -> None:
    for t in (0.1, 1.0, 4.3, 50.0):
        assert t_two_sided_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


def test_many_degrees_of_freedom_are_normal() -> None:
    assert t_quantile(0.975, 1e9) == normal_quantile(0.975) == pytest.approx(1.959963984540054)
    assert t_two_sided_p(1.96, 1e6) == pytest.approx(2 * stats.norm.cdf(-1.96), rel=1e-5)


@pytest.mark.parametrize("df", [1, 2, 3.5, 10, 99, 1e4])
def test_the_quantile_inverts_the_tail(df: float) -> None:
    for p in (0.6, 0.8, 0.975, 0.9995):
        assert t_two_sided_p(t_quantile(p, df), df) == pytest.approx(2 * (1 - p), rel=1e-9)
        assert t_quantile(1 - p, df) == pytest.approx(-t_quantile(p, df), rel=1e-9)
    assert t_quantile(0.5, df) == 0.0


def test_edges() -> None:
    assert t_two_sided_p(0.0, 5) == 1.0
    assert t_two_sided_p(math.inf, 5) == 0.0
    assert math.isnan(t_two_sided_p(math.nan, 5))
    assert math.isnan(t_two_sided_p(1.0, 0))


@pytest.mark.parametrize("df", [1, 2, 3.5, 7, 30, 299, 12345, 1e6])
def test_scipy_agrees(df: float) -> None:
    for t in (1e-3, 0.5, 1.96, 4.0, 30.0):
        assert t_two_sided_p(t, df) == pytest.approx(2 * stats.t.sf(t, df), rel=1e-8)
    for p in (0.55, 0.8, 0.975, 0.999):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-8)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3000), st.floats(-20, 20))
def test_a_sum_is_the_exactly_rounded_one(seed: int, count: int, spread: float) -> None:
    draw = np.random.default_rng(seed)
    values = draw.normal(0.0, 1.0, count) * 10.0 ** draw.uniform(-abs(spread), abs(spread), count)
    assert total(values) == math.fsum(values.tolist())


def test_a_sum_of_what_is_no_number_is_none() -> None:
    assert total(np.full(1000, np.inf)) == math.inf
    assert math.isnan(total(np.append(np.full(1000, 1.0), np.nan)))
    assert total(np.zeros(0)) == 0.0
