"""Policies against each other on the same pairs: differences, tests, and what the set can detect.

Pure functions of NumPy arrays aligned by pair (joining is the caller's). Everything is paired and, where prompts or
groups repeat, cluster-robust. Means are compared by t, 0/1 outcomes by the pairs that flipped (Tango, McNemar), which
holds for few and rare flips too. Does not decide whether two runs may be compared at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dpo_score.losses.ops import Floats
from dpo_score.metrics.intervals import (
    LEVEL,
    NO_SPREAD,
    Clusters,
    effective_size,
    mean_test,
    normal_quantile,
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
    """Mean of a − b over the pairs that both have, its interval and two-sided p; None where it cannot be had.

    `detectable`: the smallest true difference that a two-sided 5 % test on this set finds with POWER.
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
    """Pairs that changed sides from b to a. `p`: McNemar's exact one where pairs are independent, else None."""

    won: int
    lost: int
    both_right: int
    both_wrong: int
    p: float | None


def paired_difference(
    a: Floats, b: Floats, clusters: Clusters | None = None, *, power: float = POWER, level: float = LEVEL
) -> Difference:
    """Mean paired difference with a cluster-robust t interval (statistics.mean_test); NaN on either side is left out.

    Differences without spread have no interval, unless all of them are 0: then a and b say the same.
    """
    there = np.isfinite(a) & np.isfinite(b)
    kept = None if clusters is None else clusters[there]
    method = "cluster-robust t" if repeats(kept) else "paired t"
    test = mean_test((a - b)[there], kept)
    n = int(there.sum())
    if test.error is None:
        return Difference(n, test.mean if n else None, None, None, None, method, None, NOT_PAIRED)
    if test.p is None:
        return Difference(n, test.mean, None, None, None, method, None, NO_SPREAD)
    if test.error == 0.0:
        return Difference(n, 0.0, 0.0, 0.0, 1.0, method, None, EQUAL)
    half = t_quantile(0.5 + level / 2, test.df) * test.error
    detectable = detectable_difference(test.error, test.df, power)
    return Difference(n, test.mean, test.mean - half, test.mean + half, test.p, method, detectable)


def detectable_difference(error: float, df: int, power: float = POWER) -> float:
    """(t_{0.975} + t_{power})·SE: the smallest true difference found with that power. Bloom 1995."""
    return (t_quantile(0.5 + LEVEL / 2, df) + t_quantile(power, df)) * error


def share_difference(
    a: Floats, b: Floats, clusters: Clusters | None = None, *, power: float = POWER, level: float = LEVEL
) -> Difference:
    """Difference of two shares of 0/1 outcomes of the same pairs; NaN on either side is left out.

    Where nothing repeats: Tango's score interval and McNemar's mid-p, which go together (Fagerland, Lydersen and
    Laake 2013, 2014). Else both at the effective sample size, with t_{G−1} (the design effect of Eliasziw and Donner
    1991, the size as in `share_interval`): without spread every cluster counts once.
    """
    there = np.isfinite(a) & np.isfinite(b)
    change, kept = (a - b)[there], None if clusters is None else clusters[there]
    n, won, lost = len(change), int(np.sum(change > 0.0)), int(np.sum(change < 0.0))
    if n == 0:
        return Difference(0, None, None, None, None, "Tango", None, NO_PAIR)
    if not repeats(kept):
        quantiles = tuple(normal_quantile(tail) for tail in (0.5 + level / 2, 0.5 + LEVEL / 2, power))
        return _by_flips(n, won, lost, n, quantiles, "Tango", mcnemar_mid(won, lost))
    test = mean_test(change, kept)
    if test.error is None:
        return Difference(n, test.mean, None, None, None, "cluster-robust Tango", None, NOT_PAIRED)
    size = effective_size((won + lost) / n - ((won - lost) / n) ** 2, n, test)
    quantiles = tuple(t_quantile(tail, test.df) for tail in (0.5 + level / 2, 0.5 + LEVEL / 2, power))
    score = (won - lost) / math.sqrt(max(won + lost, 1)) * math.sqrt(size / n)
    return _by_flips(n, won, lost, size, quantiles, "cluster-robust Tango", t_two_sided_p(score, test.df))


def _by_flips(
    n: int, won: int, lost: int, size: float, quantiles: tuple[float, ...], method: str, p: float
) -> Difference:
    """`size`: how many independent pairs the n count for. `quantiles`: of the interval, of the 5 % test, of power."""
    weight = size / n
    low, high = tango(won * weight, lost * weight, size, quantiles[0])
    detectable = detectable_share(won + lost, n, size, quantiles[1] + quantiles[2])
    return Difference(n, (won - lost) / n, low, high, p, method, detectable, TOO_FEW if detectable is None else None)


def detectable_share(flips: int, n: int, size: float, quantiles: float) -> float | None:
    """z·√(ψ/n) with ψ the share of pairs that flip, z = z_{0.975} + z_{power}. Connor 1987, without its −δ² term.

    A difference of δ takes a share of δ that flip at least, so where few were seen it is z²/n. None: above 1.
    """
    found = max(quantiles * math.sqrt(flips / n / size), quantiles**2 / size)
    return found if found <= 1.0 else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down adjusted p values: the k-th smallest of m times m − k + 1, made monotone, at most 1. Holm 1979."""
    by_size = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(by_size):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p that a flip is as likely either way: 2·P(X ≤ min) under Binomial(won + lost, ½).

    McNemar 1947, exact form. For independent pairs only.
    """
    return min(1.0, 2.0 * _tail(won, lost)[0])


def mcnemar_mid(won: int, lost: int) -> float:
    """The same with half of what was seen: 2·P(X < min) + P(X = min). Closer to 5 % than the exact one.

    Fagerland, Lydersen and Laake 2013. For independent pairs only.
    """
    tail, seen = _tail(won, lost)
    return min(1.0, 2.0 * tail - seen)


def _tail(won: int, lost: int) -> tuple[float, float]:
    """P(X ≤ min) and P(X = min), summed downwards from min until nothing is added."""
    flips, least = won + lost, min(won, lost)
    choose = math.lgamma(flips + 1) - math.lgamma(least + 1) - math.lgamma(flips - least + 1)
    term = seen = math.exp(choose + flips * math.log(0.5))
    terms = [seen]
    for k in range(least, 0, -1):
        term *= k / (flips - k + 1)
        terms.append(term)
        if term <= 1e-18 * seen:
            break
    return math.fsum(terms), seen


def flips(right_a: Floats, right_b: Floats, clusters: Clusters | None = None) -> Flips:
    """Pairs that a ranks right and b wrong (won) and the reverse (lost), from 0/1 outcomes; ties (NaN) left out."""
    there = np.isfinite(right_a) & np.isfinite(right_b)
    a, b = right_a[there] == 1.0, right_b[there] == 1.0
    won, lost = int(np.sum(a & ~b)), int(np.sum(~a & b))
    independent = not repeats(None if clusters is None else clusters[there])
    return Flips(won, lost, int(np.sum(a & b)), int(np.sum(~a & ~b)), mcnemar(won, lost) if independent else None)


@dataclass(frozen=True, slots=True)
class PolicyDifference:
    """One policy against a fixed one. `adjusted_p` is Holm's over the family; `tied` when it is not below 5 %."""

    policy: str
    against: str
    difference: Difference
    adjusted_p: float | None
    tied: bool


Differ: TypeAlias = Callable[[Floats, Floats, Clusters | None], Difference]
"""`paired_difference`, or `share_difference` for 0/1 outcomes."""


def against(
    baseline: str,
    values: Mapping[str, Floats],
    clusters: Clusters | None = None,
    *,
    family: int | None = None,
    differ: Differ = paired_difference,
) -> list[PolicyDifference]:
    """Every other policy's paired difference to `baseline`, with Holm's adjustment over the p values that there are.

    `values`: policy → one number per pair, aligned, NaN where missing. `family`: the number of tests to adjust for
    when the baseline was itself picked from the data, as "the best" is: k(k−1)/2 covers any pick.
    """
    others = [name for name in values if name != baseline]
    found = [differ(values[name], values[baseline], clusters) for name in others]
    tested = [index for index, difference in enumerate(found) if difference.p is not None]
    raw = [p for p in (found[index].p for index in tested) if p is not None]
    padding = [1.0] * max(0, (family or 0) - len(raw))
    adjusted = dict(zip(tested, holm([*raw, *padding]), strict=False))
    return [
        PolicyDifference(name, baseline, found[index], adjusted.get(index), adjusted.get(index, 1.0) >= 1.0 - LEVEL)
        for index, name in enumerate(others)
    ]


def best_policy(values: Mapping[str, Floats]) -> str:
    """The policy with the highest mean over the pairs that all have; the first of equals."""
    common = np.logical_and.reduce([np.isfinite(value) for value in values.values()])
    means = {name: math.fsum(value[common].tolist()) for name, value in values.items()}
    return max(means, key=lambda name: means[name])


def differences_to_best(
    values: Mapping[str, Floats], clusters: Clusters | None = None, *, differ: Differ = paired_difference
) -> list[PolicyDifference]:
    """Every policy against the best one; `tied` marks those that cannot be told from it.

    The best is picked from the same data, so p is adjusted as if all k(k−1)/2 pairs had been tested (Holm 1979).
    """
    count = len(values)
    return against(best_policy(values), values, clusters, family=count * (count - 1) // 2, differ=differ)


def joined_by_pair(ids_a: Sequence[str], ids_b: Sequence[str]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Rows of a and b that hold the same pair, k-th occurrence with k-th, in a's order; then what is only in each."""
    rows_b = {key: row for row, key in enumerate(_numbered(ids_b))}
    both_a, both_b, only_a = [], [], []
    for row, key in enumerate(_numbered(ids_a)):
        partner = rows_b.pop(key, None)
        if partner is None:
            only_a.append(row)
        else:
            both_a.append(row)
            both_b.append(partner)
    return both_a, both_b, only_a, sorted(rows_b.values())


def _numbered(ids: Sequence[str]) -> list[tuple[str, int]]:
    """(id, how many of it came before)."""
    seen: dict[str, int] = {}
    keys = []
    for pair_id in ids:
        keys.append((pair_id, seen.get(pair_id, 0)))
        seen[pair_id] = seen.get(pair_id, 0) + 1
    return keys
