"""Is it preference or length? What answer length alone explains of a policy's ranking. Pure NumPy.

Lengths are scored tokens. `margin` is the β-scaled margin. NaN rows are left out. Does not model prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpo_score.losses.ops import Floats, sigmoid
from dpo_score.metrics.intervals import LEVEL, ONE_GROUP, Clusters, Interval, edge, mean, share_interval, total
from dpo_score.metrics.student import t_quantile

ITERATIONS = 50
RIDGE = 1e-3


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """`accuracy` at equal length; `slope`: log-odds of ranking right per standard deviation of length difference."""

    accuracy: float | None
    low: float | None
    high: float | None
    slope: float | None
    n: int
    reason: str | None = None


def length_baselines(
    chosen_tokens: Floats, rejected_tokens: Floats, clusters: Clusters | None = None
) -> dict[str, Interval]:
    """Accuracy of preferring the longer, and the shorter answer; pairs of equal length left out (Wilson / robust)."""
    there = np.isfinite(chosen_tokens) & np.isfinite(rejected_tokens) & (chosen_tokens != rejected_tokens)
    longer = (chosen_tokens[there] > rejected_tokens[there]) * 1.0
    kept = None if clusters is None else clusters[there]
    return {"longer_wins": share_interval(longer, kept), "shorter_wins": share_interval(1.0 - longer, kept)}


def pearson(x: Floats, y: Floats) -> float | None:
    """Correlation Σ(x−x̄)(y−ȳ)/√(Σ(x−x̄)²Σ(y−ȳ)²). Pearson 1895. None when either does not vary."""
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there] - mean(x[there]), y[there] - mean(y[there])
    scale = math.sqrt(total(x * x) * total(y * y))
    return None if scale == 0.0 or len(x) < 2 else max(-1.0, min(1.0, total(x * y) / scale))


def ranks(values: Floats) -> Floats:
    """1-based ranks; equal values share the mean of theirs."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    mid: Floats = (last - (count - 1) / 2.0)[inverse]
    return mid


def spearman(x: Floats, y: Floats) -> float | None:
    """Pearson's correlation of the ranks. Spearman 1904."""
    there = np.isfinite(x) & np.isfinite(y)
    return pearson(ranks(x[there]), ranks(y[there]))


def length_controlled_accuracy(
    margin: Floats, chosen_tokens: Floats, rejected_tokens: Floats, clusters: Clusters | None = None
) -> LengthControlled:
    """P(chosen ranked first) if both answers had one length, after AlpacaEval 2 (arXiv 2404.04475).

    A logistic regression of the outcome on tanh((nc − nr)/sd), read at 0. Its score interval holds where few
    pairs are ranked wrong, or none; clusters widen it by their design effect. Ties are left out. A weak ridge of 1e-3
    keeps separable data finite.
    """
    there = np.isfinite(margin) & (margin != 0.0) & np.isfinite(chosen_tokens) & np.isfinite(rejected_tokens)
    gap, right = (chosen_tokens - rejected_tokens)[there], (margin[there] > 0.0) * 1.0
    if len(right) < 10:
        return LengthControlled(None, None, None, None, len(right), "fewer than ten pairs without a tie")
    spread = math.sqrt(total(gap * gap) / len(gap))
    feature = np.tanh(gap / spread) if spread > 0.0 else gap
    design = np.stack([np.ones_like(feature), feature], axis=1)
    weights, bread = _fit(design, right, RIDGE)
    errors = _errors(design, right, weights)
    effect, groups = _design_effect(errors, bread, None if clusters is None else clusters[there])
    value, slope = _expit(float(weights[0])), float(weights[1])
    if groups < 2:
        return LengthControlled(value, None, None, slope, len(right), ONE_GROUP)
    limit = math.sqrt(effect) * t_quantile(0.5 + LEVEL / 2, groups - 1)
    tally = tallied(feature, right)
    low, high = (_expit(score_bound(tally, float(weights[0]), side * limit)) for side in (-1.0, 1.0))
    return LengthControlled(value, low, high, slope, len(right))


def _design_effect(errors: Floats, bread: Floats, clusters: Clusters | None) -> tuple[float, int]:
    """How much clusters widen the variance of the intercept, at least 1, and how many clusters there are."""
    among, independent = _sandwich(errors, bread, clusters), _sandwich(errors, bread, None)
    groups = len(errors) if clusters is None else len(np.unique(clusters))
    return max(1.0, float(among[0, 0] / independent[0, 0])), groups


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """Pairs of one length difference counted together: shapes (different values,). `right`: those ranked right."""

    feature: Floats
    pairs: Floats
    right: Floats

    def score(self, intercept: float) -> float:
        """The likelihood's slope in the intercept in standard errors, at the best slope of length: 0 at the fit."""
        slope = _best_slope(self, intercept)
        fitted = sigmoid(intercept + slope * self.feature)
        rise = float(np.sum(self.right - self.pairs * fitted)) - RIDGE * intercept
        weight = self.pairs * fitted * (1.0 - fitted)
        level, cross = float(np.sum(weight)) + RIDGE, float(np.sum(weight * self.feature))
        return rise / math.sqrt(level - cross * cross / (float(np.sum(weight * self.feature**2)) + RIDGE))


def tallied(feature: Floats, right: Floats) -> Tally:
    different, place = np.unique(feature, return_inverse=True)
    counts = np.bincount(place).astype(np.float64), np.bincount(place, weights=right).astype(np.float64)
    return Tally(different, *counts)


def score_bound(tally: Tally, fit: float, limit: float) -> float:
    """The intercept above the fit (limit > 0) or below it whose score is −limit. Rao 1948.

    With equal lengths throughout this is Wilson's interval on the log-odds.
    """

    def holds(intercept: float) -> bool:
        return abs(tally.score(intercept)) <= abs(limit)

    step = math.copysign(1.0, limit)
    while holds(fit + step):
        step *= 2.0
    return edge(holds, fit, fit + step)


def _best_slope(tally: Tally, intercept: float) -> float:
    """The likeliest slope given the intercept: Newton's method inside a shrinking bracket."""
    high = float(np.sum(tally.pairs)) / RIDGE
    low, slope = -high, 0.0
    for _ in range(200):
        fitted = sigmoid(intercept + slope * tally.feature)
        rise = float(np.sum(tally.feature * (tally.right - tally.pairs * fitted))) - RIDGE * slope
        low, high = (slope, high) if rise > 0.0 else (low, slope)
        step = rise / (float(np.sum(tally.feature**2 * tally.pairs * fitted * (1.0 - fitted))) + RIDGE)
        following = slope + step if low < slope + step < high else 0.5 * (low + high)
        if abs(following - slope) <= 1e-9 * (1.0 + abs(slope)):
            break
        slope = following
    return slope


def logistic_regression(
    design: Floats, outcome: Floats, clusters: Clusters | None = None, ridge: float = RIDGE
) -> tuple[Floats, Floats]:
    """Coefficients (k,) and their sandwich covariance (k, k) by Newton's method. White 1982; Liang and Zeger 1986."""
    weights, bread = _fit(design, outcome, ridge)
    return weights, _sandwich(_errors(design, outcome, weights), bread, clusters)


def _fit(design: Floats, outcome: Floats, ridge: float) -> tuple[Floats, Floats]:
    """Coefficients and the inverse curvature at the last step but one."""
    weights = np.zeros(design.shape[1])
    penalty = ridge * np.eye(design.shape[1])
    bread: Floats = penalty
    for _ in range(ITERATIONS):
        fitted = 1.0 / (1.0 + np.exp(-(design @ weights)))
        curvature = _products(design * (fitted * (1.0 - fitted))[:, None], design) + penalty
        bread = np.asarray(np.linalg.inv(curvature), np.float64)
        step = bread @ (np.sum(design * (outcome - fitted)[:, None], axis=0) - penalty @ weights)
        weights = weights + step
        if float(np.abs(step).max()) < 1e-10:
            break
    return weights, bread


def _errors(design: Floats, outcome: Floats, weights: Floats) -> Floats:
    """Each row's part in the slope of the likelihood, (n, k)."""
    return design * (outcome - 1.0 / (1.0 + np.exp(-(design @ weights))))[:, None]


def _sandwich(errors: Floats, bread: Floats, clusters: Clusters | None) -> Floats:
    meat = _summed_by_cluster(errors, clusters)
    groups = len(meat)
    return groups / max(groups - 1, 1) * bread @ _products(meat, meat) @ bread


def _products(left: Floats, right: Floats) -> Floats:
    """leftᵀ·right, (k, k), by NumPy's pairwise sums: a BLAS product may differ with the number of threads."""
    return np.stack([np.sum(left * column[:, None], axis=0) for column in right.T], axis=1)


def _summed_by_cluster(scores: Floats, clusters: Clusters | None) -> Floats:
    if clusters is None:
        return scores
    _, label = np.unique(clusters, return_inverse=True)
    return np.stack([np.bincount(label, weights=column) for column in scores.T], axis=1)


def _expit(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))
