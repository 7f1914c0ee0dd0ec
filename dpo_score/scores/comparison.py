"""Policies against each other on the same pairs: differences, tests, and what the set can detect.

Pure functions of NumPy arrays aligned by pair (joining is the caller's). Everything is paired and, where prompts or
groups repeat, cluster-robust. Does not decide whether two runs may be compared at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_score.scores.array import Floats
from dpo_score.scores.statistics import LEVEL, Clusters, mean_test, repeats
from dpo_score.scores.student import t_quantile

NOT_PAIRED = "fewer than two independent groups of pairs on both sides"


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of a − b over the pairs that both have, its 95 % interval and two-sided p; None where it cannot be had."""

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
    """Pairs that changed sides from b to a. `p`: McNemar where pairs are independent, else None."""

    won: int
    lost: int
    both_right: int
    both_wrong: int
    p: float | None


def paired_difference(a: Floats, b: Floats, clusters: Clusters | None = None, *, power: float = 0.8) -> Difference:
    """Mean paired difference with a cluster-robust t interval (statistics.mean_test); NaN on either side is left out.

    `detectable` is the true difference that a two-sided 5 % test on this set finds with the given power.
    """
    there = np.isfinite(a) & np.isfinite(b)
    kept = None if clusters is None else clusters[there]
    method = "cluster-robust t" if repeats(kept) else "paired t"
    test = mean_test((a - b)[there], kept)
    n = int(there.sum())
    if test.error is None:
        return Difference(n, test.mean if n else None, None, None, None, method, None, NOT_PAIRED)
    half = t_quantile(0.5 + LEVEL / 2, test.df) * test.error
    detectable = detectable_difference(test.error, test.df, power)
    return Difference(n, test.mean, test.mean - half, test.mean + half, test.p, method, detectable)


def detectable_difference(error: float, df: int, power: float = 0.8) -> float:
    """(t_{0.975} + t_{power})·SE: the smallest true difference found with that power. Bloom 1995."""
    return (t_quantile(0.5 + LEVEL / 2, df) + t_quantile(power, df)) * error


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
    flips = won + lost
    if flips == 0:
        return 1.0
    log_half = flips * math.log(0.5)
    log_choose = (
        math.lgamma(flips + 1) - math.lgamma(k + 1) - math.lgamma(flips - k + 1) for k in range(min(won, lost) + 1)
    )
    return min(1.0, 2.0 * math.fsum(math.exp(value + log_half) for value in log_choose))


def flips(right_a: Floats, right_b: Floats, clusters: Clusters | None = None) -> Flips:
    """Pairs that a ranks right and b wrong (won) and the reverse (lost), from 0/1 outcomes; ties (NaN) left out."""
    there = np.isfinite(right_a) & np.isfinite(right_b)
    a, b = right_a[there] == 1.0, right_b[there] == 1.0
    won, lost = int(np.sum(a & ~b)), int(np.sum(~a & b))
    independent = not repeats(None if clusters is None else clusters[there])
    return Flips(won, lost, int(np.sum(a & b)), int(np.sum(~a & ~b)), mcnemar(won, lost) if independent else None)


@dataclass(frozen=True, slots=True)
class Versus:
    """One policy against a fixed one. `adjusted_p` is Holm's over the family; `tied` when it is not below 5 %."""

    policy: str
    against: str
    difference: Difference
    adjusted_p: float | None
    tied: bool


def against(
    baseline: str, values: Mapping[str, Floats], clusters: Clusters | None = None, *, family: int | None = None
) -> list[Versus]:
    """Every other policy's paired difference to `baseline`, with Holm's adjustment over all of them.

    `values`: policy → one number per pair, aligned, NaN where missing. `family`: the number of tests to adjust for
    when the baseline was itself picked from the data, as "the best" is: k(k−1)/2 covers any pick.
    """
    others = [name for name in values if name != baseline]
    found = [paired_difference(values[name], values[baseline], clusters) for name in others]
    tested = [index for index, difference in enumerate(found) if difference.p is not None]
    raw = [p for p in (found[index].p for index in tested) if p is not None]
    padding = [1.0] * max(0, (family or 0) - len(raw))
    adjusted = dict(zip(tested, holm([*raw, *padding]), strict=False))
    return [
        Versus(name, baseline, found[index], adjusted.get(index), adjusted.get(index, 1.0) >= 1.0 - LEVEL)
        for index, name in enumerate(others)
    ]


def best_policy(values: Mapping[str, Floats]) -> str:
    """The policy with the highest mean over the pairs that all have; the first of equals."""
    common = np.logical_and.reduce([np.isfinite(value) for value in values.values()])
    means = {name: math.fsum(value[common].tolist()) for name, value in values.items()}
    return max(means, key=lambda name: means[name])


def not_worse_than_best(values: Mapping[str, Floats], clusters: Clusters | None = None) -> list[Versus]:
    """Every policy against the best one; `tied` marks those that cannot be told from it.

    The best is picked from the same data, so p is adjusted as if all k(k−1)/2 pairs had been tested (Holm 1979).
    """
    count = len(values)
    return against(best_policy(values), values, clusters, family=count * (count - 1) // 2)


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
