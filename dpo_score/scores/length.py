"""Is it preference or length? What answer length alone explains of a policy's ranking. Pure NumPy.

Lengths are scored tokens. `margin` is the β-scaled margin. NaN rows are left out. Does not model prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpo_score.scores.array import Floats
from dpo_score.scores.statistics import LEVEL, Clusters, Interval, mean, share_interval, total
from dpo_score.scores.student import normal_quantile

ITERATIONS = 50


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

    A logistic regression of the outcome on tanh((nc − nr)/sd), read at 0; interval from the cluster-robust
    (sandwich) variance on the log-odds. Ties are left out. A weak ridge of 1e-3 keeps separable data finite.
    """
    there = np.isfinite(margin) & (margin != 0.0) & np.isfinite(chosen_tokens) & np.isfinite(rejected_tokens)
    gap, right = (chosen_tokens - rejected_tokens)[there], (margin[there] > 0.0) * 1.0
    if len(right) < 10:
        return LengthControlled(None, None, None, None, len(right), "fewer than ten pairs without a tie")
    spread = math.sqrt(total(gap * gap) / len(gap))
    feature = np.tanh(gap / spread) if spread > 0.0 else gap
    design = np.stack([np.ones_like(feature), feature], axis=1)
    weights, covariance = logistic_regression(design, right, None if clusters is None else clusters[there])
    half = normal_quantile(0.5 + LEVEL / 2) * math.sqrt(float(covariance[0, 0]))
    centre = float(weights[0])
    low, value, high = (_expit(z) for z in (centre - half, centre, centre + half))
    return LengthControlled(value, low, high, float(weights[1]), len(right))


def logistic_regression(
    design: Floats, outcome: Floats, clusters: Clusters | None = None, ridge: float = 1e-3
) -> tuple[Floats, Floats]:
    """Coefficients (k,) and their sandwich covariance (k, k) by Newton's method. White 1982; Liang and Zeger 1986."""
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
    scores = design * (outcome - 1.0 / (1.0 + np.exp(-(design @ weights))))[:, None]
    meat = _summed_by_cluster(scores, clusters)
    groups = len(meat)
    return weights, groups / max(groups - 1, 1) * bread @ _products(meat, meat) @ bread


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
