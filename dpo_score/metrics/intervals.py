"""Means and shares with their 95 % intervals, over pairs that may come in clusters. Pure functions of NumPy arrays.

A cluster is a prompt or group: its pairs are not independent, so their residuals are summed before they are squared
(CR2 of Bell and McCaffrey 2002, with their degrees of freedom, fewer where few clusters carry the error, after Valliant
and Rust 2010). Where nothing repeats the formulas reduce to the textbook ones. An interval that cannot be computed is
None with a reason. Sums are made in twice the precision, so no result depends on the order of summation. scipy has the
distributions; it has neither Tango's interval nor cluster-robust means, so those are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
import scipy
from numpy.typing import NDArray

from dpo_score.losses.ops import Floats

Clusters: TypeAlias = NDArray[Any]
"""One label per row, equal for rows of one cluster."""
LEVEL = 0.95
ONE_GROUP = "all pairs belong to one prompt or group"
NO_SPREAD = "no spread between independent pairs to estimate an error from"
TOO_FEW_GROUPS = "fewer than two independent groups of pairs"
SKEWED = 0.2
"""Skewness of a mean from which its interval is corrected: Cochran's rule n > 25·γ², as γ/√n."""
LEAST_FOR_SKEWNESS, EVEN = 15, 0.7
"""Fewer degrees of freedom than this, or than this share of G − 1, do not tell how skewed the clusters are."""
KORN_GRAUBARD = "cluster-robust Clopper-Pearson (Korn-Graubard)"
UNEVEN = 0.25
"""Clusters that lose this share of their G − 1 degrees of freedom by their sizes are uneven, not only nearly equal."""
LARGE_CLUSTER = 0.1
"""The share of all pairs from which one prompt or group is worth a warning."""
_FEW = 64
"""Below, math.fsum is quicker than arrays."""
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate with its interval. `method` says how; bounds None: too little data, see `reason`."""

    value: float
    low: float | None
    high: float | None
    method: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class MeanTest:
    """Mean of a sample with standard error, degrees of freedom and the two-sided p of "the mean is 0".

    `error` 0: the sample shows no spread. Then p is None, unless every value is 0. `skewness`: of the mean's
    distribution, γ/√n for independent values; 0 where it is too small to matter (SKEWED) or cannot be told.
    """

    mean: float
    error: float | None
    df: float
    p: float | None
    skewness: float = 0.0


# --- distributions ---------------------------------------------------------------------------------------------------


def normal_quantile(p: float) -> float:
    return NormalDist().inv_cdf(p)


def t_two_sided_p(t: float, df: float) -> float:
    """P(|T| ≥ |t|) of Student's t with df degrees of freedom, not necessarily whole; NaN without any."""
    if math.isnan(t) or df <= 0:
        return math.nan
    return float(2.0 * scipy.special.stdtr(df, -abs(t)))


@lru_cache(maxsize=4096)
def t_quantile(p: float, df: float) -> float:
    """The value below which a share p of Student's t lies."""
    return float(scipy.special.stdtrit(df, p)) if df < 1e9 else normal_quantile(p)


# --- sums and clusters -----------------------------------------------------------------------------------------------


def total(values: Floats) -> float:
    """The sum in twice the precision of float64, rounded once: of few values exactly rounded (math.fsum).

    Many are added up in pairs, pairs of pairs and so on, and the error of each addition (Knuth 1969, TwoSum) beside
    them: about 106 bits, whatever the order of magnitude, in a tenth of the time. Depends on the values alone, not on
    the blocks they came in.
    """
    if len(values) < _FEW:
        return math.fsum(values.tolist())
    sums = np.asarray(values, np.float64)
    errors = np.zeros(1)
    with np.errstate(all="ignore"):  # an infinity among the values is the sum, and its error no number
        while len(sums) > 1:
            if len(sums) % 2:
                sums = np.append(sums, 0.0)
            if len(errors) > 1 and len(errors) % 2:
                errors = np.append(errors, 0.0)
            one, other = sums[0::2], sums[1::2]
            sums = one + other
            back = sums - one
            lost = (one - (sums - back)) + (other - back)
            errors = lost + (errors[0::2] + errors[1::2]) if len(errors) > 1 else lost
        whole = float(sums[0]) + float(errors[0])
    return whole if math.isfinite(whole) else float(sums[0])


def mean(values: Floats) -> float:
    """Arithmetic mean by exact summation; NaN when empty."""
    return total(values) / len(values) if len(values) else math.nan


def deviation(values: Floats) -> float | None:
    """Sample standard deviation (n − 1); None below two values."""
    if len(values) < 2:
        return None
    centred = values - mean(values)
    return math.sqrt(total(centred * centred) / (len(values) - 1))


def repeats(clusters: Clusters | None) -> bool:
    """True when some cluster holds more than one row."""
    if clusters is None or not len(clusters):
        return False
    if np.issubdtype(clusters.dtype, np.signedinteger):
        least, most = int(clusters.min()), int(clusters.max())
        if most - least < 8 * len(clusters):  # as connected_clusters gives them: no need to sort
            return bool(np.bincount(clusters - least).max() > 1)
    return len(np.unique(clusters)) < len(clusters)


def cluster_sizes(clusters: Clusters) -> Floats:
    """Rows of each cluster, in label order."""
    return np.unique(clusters, return_counts=True)[1].astype(np.float64)


def effective_clusters(clusters: Clusters) -> float:
    """n²/Σ n_g²: as many clusters of equal size would be as unevenly filled. 0 without rows. Kish 1965."""
    sizes = cluster_sizes(clusters)
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if len(sizes) else 0.0


def connected_clusters(*labels: Clusters) -> NDArray[np.int64]:
    """Join rows that share a label in any of the columns, directly or through others: one label per row.

    Each pass lowers a row's label to the least one in its groups, until nothing changes.
    """
    if not labels or not len(labels[0]):
        return np.zeros(len(labels[0]) if labels else 0, np.int64)
    inverse = [np.unique(column, return_inverse=True)[1] for column in labels]
    current = inverse[0].astype(np.int64)
    while len(labels) > 1:
        before = current
        for groups in inverse:
            least = np.full(int(groups.max()) + 1, np.iinfo(np.int64).max)
            np.minimum.at(least, groups, current)
            current = least[groups]
        if np.array_equal(before, current):
            break
    return current


# --- means -----------------------------------------------------------------------------------------------------------


def mean_test(values: Floats, clusters: Clusters | None = None) -> MeanTest:
    """Cluster-robust t test of a mean: CR2 with degrees of freedom for uneven clusters.

    Var = Σ_g S_g²/(1 − n_g/n) / n² with S_g = Σ_{i∈g} (x_i − x̄). For clusters of one row this is s²/n with n − 1
    degrees of freedom. Clusters of uneven size, and few of them that carry most of the error, leave fewer.

    Computed on values times a power of two, which changes no digit: squares of losses near 1e-200 would be 0.
    """
    exponent = int(np.frexp(np.abs(values).max(initial=0.0))[1])
    found = _mean_test(np.ldexp(values, -exponent), clusters)
    error = None if found.error is None else math.ldexp(found.error, exponent)
    return replace(found, mean=math.ldexp(found.mean, exponent), error=error)


def _mean_test(values: Floats, clusters: Clusters | None) -> MeanTest:
    """`mean_test` of values of which the largest is about 1."""
    centre, n = mean(values), len(values)
    residuals, sizes = values - centre, np.ones(n)
    if clusters is not None and n:
        _, label = np.unique(clusters, return_inverse=True)
        residuals = np.bincount(label, weights=residuals).astype(np.float64)
        sizes = np.bincount(label).astype(np.float64)
    if len(residuals) < 2:
        return MeanTest(centre, None, 0, None)
    rest = 1.0 - sizes / n
    df = by_size = _degrees_of_freedom(sizes, rest)
    error = math.sqrt(total(residuals * residuals / rest)) / n
    if error <= _ROUNDING * float(np.abs(values).max()):
        return MeanTest(centre, 0.0, df, None if values.any() else 1.0)
    if by_size < len(sizes) - 1:
        df = _fewer(by_size, residuals * residuals / rest)
    skewed = by_size >= max(LEAST_FOR_SKEWNESS, EVEN * (len(sizes) - 1))
    skewness = _skewness(residuals, n * error) if skewed else 0.0
    statistic = centre / error
    p = max(t_two_sided_p(statistic, df), t_two_sided_p(_unskewed(statistic, skewness), df))
    return MeanTest(centre, error, df, p, skewness)


def _degrees_of_freedom(sizes: Floats, rest: Floats) -> float:
    """(tr M)²/tr M² of M_gh = n_g(δ_gh − n_h/n)/√(rest_g·rest_h): Satterthwaite's, were all rows independent."""
    if sizes.min() == sizes.max():
        return float(len(sizes) - 1)
    n = float(sizes.sum())
    weights = sizes * sizes / rest
    off_diagonal = weights.sum() ** 2 - (weights * weights).sum()
    return float(n * n / ((sizes * sizes).sum() + off_diagonal / (n * n)))


def _fewer(by_size: float, squares: Floats) -> float:
    """Degrees of freedom where few of G uneven clusters have most of Σ q_g, the squared residual sums: 1/√(a² + b²).

    a = 1/by_size. b: what q_g say beyond G equal clusters, b² = 1/df_q² − 1/(G − 1)², with Satterthwaite's
    df_q = 2(Σ q)²/(Σ q² − (Σ q)²/G) from the fourth moments (Valliant and Rust 2010). Uneven sizes show in both, so a
    and b are not simply added; b comes in by degrees, so that G equal clusters keep the G − 1 of the textbook. With a
    alone, intervals of shares are too short: tests/metrics/simulate.py.
    """
    count, whole = len(squares), float(squares.sum())
    by_value = (float((squares * squares).sum()) - whole * whole / count) / (2.0 * whole * whole)
    uneven = min(1.0, (1.0 - by_size / (count - 1)) / UNEVEN)
    return 1.0 / math.sqrt(by_size**-2 + uneven * max(0.0, by_value**2 - (count - 1) ** -2))


def _skewness(residuals: Floats, scale: float) -> float:
    """Third cumulant of the mean in units of its standard error, Σ S_g³/(n·error)³; 0 below SKEWED.

    A sample shows less skewness than its population has; 1 + 8.5/G makes up for it (Hazen 1930).
    """
    found = (1.0 + 8.5 / len(residuals)) * total(residuals * residuals * residuals) / scale**3
    return found if abs(found) > SKEWED else 0.0


def _unskewed(t: float, skewness: float) -> float:
    """t + λ(t²/3 + 1/6) + λ²t³/27: a t statistic made symmetric. Hall 1992, "removal of skewness by transformation"."""
    return t + skewness * (t * t / 3.0 + 1.0 / 6.0) + skewness * skewness * t**3 / 27.0


def _skewed(u: float, skewness: float) -> float:
    """The t of which `_unskewed` makes u: (3/λ)·[∛(1 + λ(u − λ/6)) − 1]."""
    if skewness == 0.0:
        return u
    return 3.0 / skewness * (math.cbrt(1.0 + skewness * (u - skewness / 6.0)) - 1.0)


def mean_bounds(test: MeanTest, level: float = LEVEL) -> tuple[float, float]:
    """x̄ ± t·error, each end moved out for skewness, never in: a few outliers of a symmetric law look like skewness.

    They hold 0 exactly where p > 1 − level.
    """
    assert test.error is not None
    quantile = t_quantile(0.5 + level / 2, test.df)
    below, above = max(quantile, _skewed(quantile, test.skewness)), min(-quantile, _skewed(-quantile, test.skewness))
    return test.mean - below * test.error, test.mean - above * test.error


def mean_method(test: MeanTest, clusters: Clusters | None) -> str:
    """How a mean's interval is computed, in words."""
    return ("cluster-robust " if repeats(clusters) else "") + ("skewness-corrected t" if test.skewness else "t")


def mean_interval(values: Floats, clusters: Clusters | None = None, level: float = LEVEL) -> Interval:
    """The interval of `mean_test`, widened for skewness where that matters. A constant has itself as bounds."""
    test = mean_test(values, clusters)
    method = mean_method(test, clusters)
    if test.error is None:
        return Interval(test.mean, None, None, method, TOO_FEW_GROUPS)
    if test.error == 0.0 and np.ptp(values) > 0.0:
        return Interval(test.mean, None, None, method, NO_SPREAD)
    return Interval(test.mean, *mean_bounds(test, level), method)


# --- shares ----------------------------------------------------------------------------------------------------------


def wilson(successes: float, n: float, z: float | None = None) -> tuple[float, float]:
    """The score interval of a share. Wilson 1927. `n` may be an effective size, not whole."""
    z = normal_quantile(0.5 + LEVEL / 2) if z is None else z
    share, z2 = successes / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if successes <= 0 else max(0.0, centre - half)
    return low, 1.0 if successes >= n else min(1.0, centre + half)


def clopper_pearson(successes: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """The exact interval of a share. Clopper and Pearson 1934. `n` may be an effective size, not whole."""
    tail = (1.0 - level) / 2
    low = float(scipy.special.betaincinv(successes, n - successes + 1.0, tail)) if successes > 0.0 else 0.0
    high = float(scipy.special.betaincinv(successes + 1.0, n - successes, 1.0 - tail)) if successes < n else 1.0
    return low, high


def share_interval(outcomes: Floats, clusters: Clusters | None = None, level: float = LEVEL) -> Interval:
    """A share of 0/1 outcomes: Wilson's where nothing repeats, else that of Korn and Graubard 1998.

    Theirs is Clopper and Pearson's at the effective size share·(1−share)/Var, with the cluster-robust Var, at most n,
    made smaller by (z/t)² for the degrees of freedom of Var. Where the clusters show no spread, the effective size is
    their effective number.
    """
    n, tail = len(outcomes), 0.5 + level / 2
    if n == 0:
        return Interval(math.nan, None, None, "none", "no pair to count")
    share = mean(outcomes)
    if clusters is None or not repeats(clusters):
        low, high = wilson(total(outcomes), n, normal_quantile(tail))
        return Interval(share, low, high, "Wilson")
    test = mean_test(outcomes, clusters)
    if test.error is None:
        return Interval(share, None, None, KORN_GRAUBARD, ONE_GROUP)
    effective = effective_size(share * (1 - share), clusters, test)
    effective *= (normal_quantile(tail) / t_quantile(tail, test.df)) ** 2
    return Interval(share, *clopper_pearson(share * effective, effective, level), KORN_GRAUBARD)


def effective_size(variance: float, clusters: Clusters, test: MeanTest) -> float:
    """How many independent rows of this variance have the error of these clustered ones; at most all of them."""
    assert test.error is not None
    return min(float(len(clusters)), variance / test.error**2) if test.error > 0.0 else effective_clusters(clusters)


def tango(won: float, lost: float, n: float, z: float) -> tuple[float, float]:
    """The score interval of (won − lost)/n, a difference of two shares of the same n pairs. Tango 1998.

    won, lost: pairs that only one side has right; with n they may be an effective size, not whole. At z of a 95 %
    interval it holds 0 where McNemar's p, uncorrected, is above 5 %.
    """
    share, bounds = (won - lost) / n, []
    for side, end in ((1.0, -1.0), (-1.0, 1.0)):
        if side * _tango_score(end, won, lost, n) <= z or share == end:
            bounds.append(end)
            continue
        bounds.append(
            scipy.optimize.brentq(
                lambda delta, side=side: min(side * _tango_score(delta, won, lost, n), 1e6) - z,
                end,
                share,
                xtol=1e-13,
                rtol=1e-13,
            )
        )
    return min(bounds[0], share), max(bounds[1], share)


def _tango_score(delta: float, won: float, lost: float, n: float) -> float:
    """(won − lost − nδ)/√(n(2q + δ(1 − δ))), q the likeliest share of lost pairs given the difference δ."""
    linear, constant = (2.0 * n - won + lost) * delta - won - lost, -lost * delta * (1.0 - delta)
    root = math.sqrt(max(0.0, linear * linear - 8.0 * n * constant))
    q = -2.0 * constant / (root + linear) if linear > 0.0 else (root - linear) / (4.0 * n)
    distance, variance = won - lost - n * delta, n * (2.0 * q + delta * (1.0 - delta))
    if abs(distance) <= _ROUNDING * n:
        return 0.0
    return distance / math.sqrt(variance) if variance > 0.0 else math.copysign(math.inf, distance)


def quantiles(values: Floats, at: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> dict[str, float]:
    """Quantiles with linear interpolation (Hyndman and Fan 1996, type 7), keyed "p5" …; empty for no values."""
    if not len(values):
        return {}
    found = np.quantile(values, at)
    return {f"p{round(100 * p)}": float(q) for p, q in zip(at, found, strict=True)}
