"""Means, shares and their 95 % intervals over pairs that may come in clusters. Pure functions of NumPy arrays.

A cluster is what repeats: pairs of one prompt or group are not independent, so their residuals are summed before
they are squared. Without repetition the formulas reduce to the textbook ones. Sums are math.fsum: exactly rounded,
so no result depends on NumPy's summation order. An interval that cannot be had is None: no spread is not certainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from statistics import NormalDist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dpo_score.losses.ops import Floats

_NORMAL = NormalDist()
_LARGE = 1e7


def normal_quantile(p: float) -> float:
    return _NORMAL.inv_cdf(p)


def normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


def t_two_sided_p(t: float, df: float) -> float:
    """P(|T| ≥ |t|) with df degrees of freedom: the regularised incomplete beta I_{df/(df+t²)}(df/2, ½).

    Abramowitz and Stegun 26.7.1.
    """
    if math.isnan(t) or df <= 0:
        return math.nan
    if math.isinf(t):
        return 0.0
    if df > _LARGE:
        return math.erfc(abs(t) / math.sqrt(2.0))
    return _incomplete_beta(df / 2.0, 0.5, df / (df + t * t))


@lru_cache(maxsize=4096)
def t_quantile(p: float, df: float) -> float:
    """The value below which a share p of Student's t lies, by bisection on the two-sided tail."""
    if df > _LARGE:
        return normal_quantile(p)
    if p == 0.5:
        return 0.0
    tail = 2.0 * min(p, 1.0 - p)
    low, high = 0.0, 1.0
    while t_two_sided_p(high, df) > tail:
        low, high = high, 2.0 * high
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if t_two_sided_p(middle, df) > tail else (low, middle)
    return math.copysign(0.5 * (low + high), p - 0.5)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b). The continued fraction converges fast below the mean; above it, the symmetric one is used."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1.0) / (a + b + 2.0):
        return math.exp(log_front) * _beta_fraction(a, b, x) / a
    return 1.0 - math.exp(log_front) * _beta_fraction(b, a, 1.0 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta (Abramowitz and Stegun 26.5.8), by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0), tiny)
    result = d
    for m in range(1, 20_000):
        even = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        for step in (even, odd):
            d = 1.0 / _away_from_zero(1.0 + step * d, tiny)
            c = _away_from_zero(1.0 + step / c, tiny)
            result *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return result


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


Clusters: TypeAlias = NDArray[Any]
"""One label per row, equal for rows of one cluster."""
LEVEL = 0.95
ONE_GROUP = "all pairs belong to one prompt or group"
NO_SPREAD = "no spread between independent pairs to estimate an error from"
_SLICE = 65_536
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

    Error 0: the sample shows no spread. Then p is None, unless every value is 0.
    """

    mean: float
    error: float | None
    df: int
    p: float | None


def total(values: Floats) -> float:
    """Exactly rounded sum. Python floats are made a slice at a time: they take five times the room of the array."""
    slices = (values[start : start + _SLICE].tolist() for start in range(0, len(values), _SLICE))
    return math.fsum(chain.from_iterable(slices))


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
    return clusters is not None and len(np.unique(clusters)) < len(clusters)


def cluster_sums(values: Floats, clusters: Clusters | None) -> Floats:
    """Sum of the values of each cluster, in label order; the values themselves without clusters."""
    if clusters is None or not len(values):
        return values
    _, label = np.unique(clusters, return_inverse=True)
    return np.bincount(label, weights=values).astype(np.float64)


def mean_test(values: Floats, clusters: Clusters | None = None) -> MeanTest:
    """Cluster-robust t test of a mean. Liang and Zeger 1986, with the G/(G−1) correction and G − 1 df.

    Var = G/(G−1) · Σ_g (Σ_{i∈g} (x_i − x̄))² / n², G clusters; for clusters of one row this is s²/n.
    """
    centre = mean(values)
    residuals = cluster_sums(values - centre, clusters)
    groups, n = len(residuals), len(values)
    if groups < 2:
        return MeanTest(centre, None, 0, None)
    error = math.sqrt(groups / (groups - 1) * total(residuals * residuals)) / n
    if error <= _ROUNDING * float(np.abs(values).max()):
        return MeanTest(centre, 0.0, groups - 1, None if values.any() else 1.0)
    return MeanTest(centre, error, groups - 1, t_two_sided_p(centre / error, groups - 1))


def mean_interval(values: Floats, clusters: Clusters | None = None, level: float = LEVEL) -> Interval:
    """x̄ ± t_{G−1}·error of `mean_test`. Where every value is the same, so are the bounds."""
    method = "cluster-robust t" if repeats(clusters) else "t"
    test = mean_test(values, clusters)
    if test.error is None:
        return Interval(test.mean, None, None, method, "fewer than two independent groups of pairs")
    if test.error == 0.0 and np.ptp(values) > 0.0:
        return Interval(test.mean, None, None, method, NO_SPREAD)
    half = t_quantile(0.5 + level / 2, test.df) * test.error
    return Interval(test.mean, test.mean - half, test.mean + half, method)


def wilson(successes: float, n: float, z: float | None = None) -> tuple[float, float]:
    """The score interval of a share. Wilson 1927. `n` may be an effective size, not whole."""
    z = normal_quantile(0.5 + LEVEL / 2) if z is None else z
    share, z2 = successes / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if successes <= 0 else max(0.0, centre - half)
    return low, 1.0 if successes >= n else min(1.0, centre + half)


def share_interval(outcomes: Floats, clusters: Clusters | None = None, level: float = LEVEL) -> Interval:
    """A share of 0/1 outcomes: Wilson where nothing repeats, else Wilson at the effective sample size.

    Effective n = share·(1−share)/Var with the cluster-robust Var, at most n, and t_{G−1} for z (Korn and Graubard
    1998; Dean and Pagano 2015). Where the clusters show no spread, every cluster counts once.
    """
    n, tail = len(outcomes), 0.5 + level / 2
    if n == 0:
        return Interval(math.nan, None, None, "none", "no pair to count")
    share = mean(outcomes)
    if not repeats(clusters):
        low, high = wilson(total(outcomes), n, normal_quantile(tail))
        return Interval(share, low, high, "Wilson")
    test = mean_test(outcomes, clusters)
    if test.error is None:
        return Interval(share, None, None, "cluster-robust Wilson", ONE_GROUP)
    effective = effective_size(share * (1 - share), n, test)
    low, high = wilson(share * effective, effective, t_quantile(tail, test.df))
    return Interval(share, low, high, "cluster-robust Wilson")


def effective_size(variance: float, n: int, test: MeanTest) -> float:
    """How many independent rows of this variance have the error of n clustered ones; at most n, without spread G."""
    assert test.error is not None
    return min(float(n), variance / test.error**2) if test.error > 0.0 else float(test.df + 1)


def tango(won: float, lost: float, n: float, z: float) -> tuple[float, float]:
    """The score interval of (won − lost)/n, a difference of two shares of the same n pairs. Tango 1998.

    won, lost: pairs that only one side has right; with n they may be an effective size, not whole. At z of a 95 %
    interval it holds 0 where McNemar's p, uncorrected, is above 5 %.
    """
    share = (won - lost) / n
    low = edge(lambda delta: _tango_score(delta, won, lost, n) <= z, share, -1.0)
    high = edge(lambda delta: _tango_score(delta, won, lost, n) >= -z, share, 1.0)
    return low, high


def _tango_score(delta: float, won: float, lost: float, n: float) -> float:
    """(won − lost − nδ)/√(n(2q + δ(1 − δ))), q the likeliest share of lost pairs given the difference δ."""
    linear, constant = (2.0 * n - won + lost) * delta - won - lost, -lost * delta * (1.0 - delta)
    root = math.sqrt(max(0.0, linear * linear - 8.0 * n * constant))
    q = -2.0 * constant / (root + linear) if linear > 0.0 else (root - linear) / (4.0 * n)
    distance, variance = won - lost - n * delta, n * (2.0 * q + delta * (1.0 - delta))
    return distance / math.sqrt(variance) if variance > 0.0 else math.copysign(math.inf, distance)


def edge(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """How far `holds` reaches from `inside`, where it does, towards `outside`, where it does not: by bisection."""
    for _ in range(60):
        middle = 0.5 * (inside + outside)
        if abs(outside - inside) <= 1e-12 * (1.0 + abs(inside)):
            break
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


def quantiles(values: Floats, at: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> dict[str, float]:
    """Quantiles with linear interpolation (Hyndman and Fan 1996, type 7), keyed "p5" …; empty for no values."""
    if not len(values):
        return {}
    found = np.quantile(values, at)
    return {f"p{round(100 * p)}": float(q) for p, q in zip(at, found, strict=True)}


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
