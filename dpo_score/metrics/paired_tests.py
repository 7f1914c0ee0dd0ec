"""Policies against each other on the same pairs: differences, tests, and what the set can detect.

Pure functions of NumPy arrays that are aligned by pair (compare.py joins them). Everything is paired and, where
prompts or groups repeat, cluster-robust. Means are compared by t, 0/1 outcomes by the pairs that flipped (Tango,
McNemar), which holds for few and rare flips too. Whether two runs may be compared at all is decided in compare.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from dpo_score.losses.ops import Floats
from dpo_score.metrics.intervals import (
    LEVEL,
    NO_SPREAD,
    Clusters,
    MeanTest,
    effective_size,
    mean_bounds,
    mean_method,
    mean_test,
    repeats,
    t_quantile,
    t_two_sided_p,
    tango,
)

NOT_PAIRED = "fewer than two independent groups of pairs on both sides"
NO_PAIR = "no pair that both sides rank"
EQUAL = "both sides are equal on every pair, so nothing says what a difference would look like"
TOO_FEW = "even a difference of 100 points would not be found four times in five on so few pairs"
POWER = 0.8


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of a − b over the pairs that both have, its interval and two-sided p; None where it cannot be computed.

    The interval holds 0 exactly where p is at least 1 − level. `detectable`: the smallest true difference that a
    two-sided test on this set finds with POWER, at 5 % over all `tests` (Bonferroni).
    """

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    method: str
    detectable: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Flips:
    """Pairs that changed sides from b to a."""

    won: int
    lost: int
    both_right: int
    both_wrong: int


@dataclass(frozen=True, slots=True)
class PolicyDifference:
    """One policy minus a fixed one. `adjusted_p` is Holm's over the family; `tied` when it is not below 5 %."""

    policy: str
    against: str
    difference: Difference
    adjusted_p: float | None
    tied: bool


# --- one difference --------------------------------------------------------------------------------------------------


def paired_difference(
    a: Floats,
    b: Floats,
    clusters: Clusters | None = None,
    *,
    power: float = POWER,
    level: float = LEVEL,
    tests: int = 1,
) -> Difference:
    """Mean paired difference with the interval and p of `intervals.mean_test`; NaN on either side is left out.

    Differences without spread have no interval, unless all of them are 0: then a and b say the same.
    """
    there = np.isfinite(a) & np.isfinite(b)
    kept = None if clusters is None else clusters[there]
    test = mean_test((a - b)[there], kept)
    n, method = int(there.sum()), mean_method(test, kept)
    method = method if repeats(kept) else f"paired {method}"
    if test.error is None:
        return Difference(n, test.mean if n else None, None, None, None, method, None, NOT_PAIRED)
    if test.p is None:
        return Difference(n, test.mean, None, None, None, method, None, NO_SPREAD)
    if test.error == 0.0:
        return Difference(n, 0.0, 0.0, 0.0, 1.0, method, None, EQUAL)
    detectable = detectable_difference(test, power, tests)
    return Difference(n, test.mean, *mean_bounds(test, level), test.p, method, detectable)


def detectable_difference(test: MeanTest, power: float = POWER, tests: int = 1) -> float:
    """(t_{1 − α/2} + t_{power})·SE, α = 5 %/tests: the smallest true difference found with that power. Bloom 1995.

    In place of t_{1 − α/2}·SE stands the longer arm of the interval, which skewness widens: the difference is found in
    either direction. An SE of few degrees of freedom is mostly too small: its median is short of the true one by about
    1/(3·df) of itself (the median of χ², Wilson and Hilferty 1931).
    """
    assert test.error is not None
    low, high = mean_bounds(test, 2.0 * _significant(tests) - 1.0)
    arm = max(test.mean - low, high - test.mean)
    return (arm + t_quantile(power, test.df) * test.error) * (1.0 + 1.0 / (3.0 * test.df))


def _significant(tests: int) -> float:
    """The upper quantile of a two-sided 5 % test that is one of so many (Bonferroni)."""
    return 1.0 - (1.0 - LEVEL) / (2 * tests)


def share_difference(
    a: Floats,
    b: Floats,
    clusters: Clusters | None = None,
    *,
    power: float = POWER,
    level: float = LEVEL,
    tests: int = 1,
) -> Difference:
    """Difference of two shares of 0/1 outcomes of the same pairs; NaN on either side is left out.

    Where nothing repeats: Tango's score interval and McNemar's mid-p, which go together (Fagerland, Lydersen and
    Laake 2013, 2014); where the two disagree on 0, the wider interval or the larger p of the score test is given. Else
    both at the effective sample size, with Student's t (the design effect of Eliasziw and Donner 1991, the size as in
    `share_interval`).
    """
    there = np.isfinite(a) & np.isfinite(b)
    change, kept = (a - b)[there], None if clusters is None else clusters[there]
    n, won, lost = len(change), int(np.sum(change > 0.0)), int(np.sum(change < 0.0))
    if n == 0:
        return Difference(0, None, None, None, None, "Tango", None, NO_PAIR)
    if kept is None or not repeats(kept):
        size, df, method = float(n), math.inf, "Tango"
    else:
        test, method = mean_test(change, kept), "cluster-robust Tango"
        if test.error is None:
            return Difference(n, test.mean, None, None, None, method, None, NOT_PAIRED)
        size, df = effective_size((won + lost) / n - ((won - lost) / n) ** 2, kept, test), test.df
    weight = size / n
    low, high = tango(won * weight, lost * weight, size, t_quantile(0.5 + level / 2, df))
    p = t_two_sided_p((won - lost) * math.sqrt(weight / max(won + lost, 1)), df)
    if df == math.inf:
        p, low, high = _agreed(mcnemar_mid(won, lost), p, low, high, 1.0 - level)
    quantiles = t_quantile(_significant(tests), df) + t_quantile(power, df)
    detectable = detectable_share(won + lost, n, size, quantiles)
    return Difference(n, (won - lost) / n, low, high, p, method, detectable, TOO_FEW if detectable is None else None)


def _agreed(mid_p: float, score_p: float, low: float, high: float, alpha: float) -> tuple[float, float, float]:
    """p and bounds that agree on whether the difference is 0: the more careful of the two decides."""
    if mid_p >= alpha:
        return mid_p, min(low, 0.0), max(high, 0.0)
    return (mid_p if low > 0.0 or high < 0.0 else max(score_p, alpha)), low, high


def detectable_share(flips: int, n: int, size: float, quantiles: float) -> float | None:
    """z·√(ψ/n) with ψ the share of pairs that flip, z = z_{1 − α/2} + z_{power}. Connor 1987, without its −δ² term.

    A difference of δ takes a share of δ that flip at least, so where few were seen it is z²/n. None: above 1.
    """
    found = max(quantiles * math.sqrt(flips / n / size), quantiles**2 / size)
    return found if found <= 1.0 else None


# --- flips -----------------------------------------------------------------------------------------------------------


def flips(right_a: Floats, right_b: Floats) -> Flips:
    """Pairs that a ranks right and b wrong (won) and the reverse (lost), from 0/1 outcomes; ties (NaN) left out."""
    there = np.isfinite(right_a) & np.isfinite(right_b)
    a, b = right_a[there] == 1.0, right_b[there] == 1.0
    return Flips(*(int(np.sum(both)) for both in (a & ~b, ~a & b, a & b, ~a & ~b)))


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p that a flip is as likely either way: 2·P(X ≤ min) under Binomial(won + lost, ½).

    McNemar 1947, exact form. For independent pairs only.
    """
    return min(1.0, 2.0 * float(scipy.special.bdtr(min(won, lost), won + lost, 0.5)))


def mcnemar_mid(won: int, lost: int) -> float:
    """The same with half of what was seen: 2·P(X < min) + P(X = min). Closer to 5 % than the exact one.

    Fagerland, Lydersen and Laake 2013. For independent pairs only.
    """
    least, flipped = min(won, lost), won + lost
    below = float(scipy.special.bdtr(least - 1, flipped, 0.5)) if least else 0.0
    return min(1.0, below + float(scipy.special.bdtr(least, flipped, 0.5)))


# --- several policies ------------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down adjusted p values: the k-th smallest of m times m − k + 1, made monotone, at most 1. Holm 1979."""
    by_size = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(by_size):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def differences_to(
    baseline: str,
    values: Mapping[str, Floats],
    clusters: Clusters | None = None,
    *,
    family: int | None = None,
    differ: Callable[..., Difference] = paired_difference,
) -> list[PolicyDifference]:
    """Every other policy's paired difference to `baseline`, with Holm's adjustment over the p values that there are.

    `values`: policy → one number per pair, aligned, NaN where missing. `differ`: `paired_difference`, or
    `share_difference` for 0/1 outcomes. `family`: the number of tests to adjust for when the baseline was itself
    picked from the data, as "the best" is: k(k−1)/2 covers any pick. What is detectable is so within the family.
    """
    others = [name for name in values if name != baseline]
    tests = max(family or 0, len(others), 1)
    found = [differ(values[name], values[baseline], clusters, tests=tests) for name in others]
    tested = [index for index, difference in enumerate(found) if difference.p is not None]
    raw = [p for p in (found[index].p for index in tested) if p is not None]
    padding = [1.0] * max(0, (family or 0) - len(raw))
    adjusted = dict(zip(tested, holm([*raw, *padding]), strict=False))
    return [
        PolicyDifference(name, baseline, found[index], adjusted.get(index), adjusted.get(index, 1.0) >= 1.0 - LEVEL)
        for index, name in enumerate(others)
    ]


def best_policy(values: Mapping[str, Floats]) -> str:
    """The policy with the highest mean over its own values; the first of equals."""
    means = {
        name: math.fsum(value[np.isfinite(value)].tolist()) / np.isfinite(value).sum() for name, value in values.items()
    }
    return max(means, key=lambda name: means[name])


def differences_to_best(
    values: Mapping[str, Floats],
    clusters: Clusters | None = None,
    *,
    differ: Callable[..., Difference] = paired_difference,
) -> list[PolicyDifference]:
    """Every policy against the best one; `tied` marks those that cannot be told from it.

    The best is picked from the same data, so p is adjusted as if all k(k−1)/2 pairs had been tested (Holm 1979).
    """
    count = len(values)
    return differences_to(best_policy(values), values, clusters, family=count * (count - 1) // 2, differ=differ)
