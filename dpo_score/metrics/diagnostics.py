"""What every number of a summary means: one sentence and a source each. Shown by reports; holds no arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_score.losses.ops import Floats, log_sigmoid, sigmoid
from dpo_score.metrics.arrays import ScoreArrays
from dpo_score.metrics.intervals import (
    LEVEL,
    ONE_GROUP,
    Clusters,
    Interval,
    edge,
    mean,
    mean_interval,
    share_interval,
    t_quantile,
    total,
)

BETA_RANGE = (1e-4, 1e2)


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs whose confidence lies in [low, high): how many, their mean confidence, the share ranked as labelled."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """`ece`: expected calibration error; `brier`: mean squared error of σ(margin) against 1; `nll`: mean −log σ."""

    n: int
    ece: float | None
    brier: float | None
    nll: float | None
    bins: tuple[Bin, ...]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class BetaFit:
    """The β with the least mean −log σ(β·nats). `at_edge`: the likelihood still falls at the end of the range."""

    beta: float | None
    nll: float | None
    at_edge: bool
    reason: str | None = None


def calibration(margins: Floats, bins: int = 10) -> Calibration:
    """Reliability over equal bins of confidence in [½, 1]; ECE = Σ n_b/n·|accuracy − confidence|.

    Guo et al., arXiv 1706.04599 eq. 3. `margins`: β-scaled, shape (pairs,).
    """
    kept = margins[np.isfinite(margins)]
    if not len(kept):
        return Calibration(0, None, None, None, (), "no margin")
    confidence = sigmoid(np.abs(kept))
    right = np.where(kept > 0.0, 1.0, np.where(kept < 0.0, 0.0, 0.5))
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    found = tuple(_bin(confidence, right, index, b, bins) for b in range(bins))
    gaps = [b.n * abs(b.accuracy - b.confidence) for b in found if b.accuracy is not None and b.confidence is not None]
    miss = 1.0 - sigmoid(kept)
    return Calibration(len(kept), math.fsum(gaps) / len(kept), mean(miss * miss), mean(-log_sigmoid(kept)), found)


def _bin(confidence: Floats, right: Floats, index: np.ndarray[tuple[int], np.dtype[np.int_]], b: int, bins: int) -> Bin:
    inside = index == b
    low, high = 0.5 + b / (2 * bins), 0.5 + (b + 1) / (2 * bins)
    if not inside.any():
        return Bin(low, high, 0, None, None)
    return Bin(low, high, int(inside.sum()), mean(confidence[inside]), mean(right[inside]))


def best_beta(margins_nats: Floats) -> BetaFit:
    """argmin_β mean −log σ(β·(Δc − Δr)): the maximum-likelihood temperature of the Bradley–Terry model.

    Temperature scaling, arXiv 1706.04599 §4.2, with β = 1/T. The objective is convex in β: Newton's method inside a
    shrinking bracket. Null when every margin is 0, or when the mean margin is not positive (then β → 0 fits best:
    the policy knows no better than chance).
    """
    kept = margins_nats[np.isfinite(margins_nats)]
    if not len(kept) or not kept.any():
        return BetaFit(None, None, False, "no margin other than 0")
    if total(kept) <= 0.0:
        return BetaFit(None, math.log(2.0), True, "the mean margin is not positive: no beta beats chance")
    edge = BETA_RANGE[0] if _slope(kept, BETA_RANGE[0])[0] >= 0.0 else BETA_RANGE[1]
    at_edge = edge == BETA_RANGE[0] or _slope(kept, edge)[0] <= 0.0
    beta = edge if at_edge else _minimum(kept)
    return BetaFit(beta, mean(-log_sigmoid(beta * kept)), at_edge)


def _minimum(nats: Floats) -> float:
    """The root of the slope in BETA_RANGE, where it changes sign."""
    low, high = BETA_RANGE
    beta = 1.0
    for _ in range(200):
        slope, curvature = _slope(nats, beta)
        low, high = (low, beta) if slope > 0.0 else (beta, high)
        step = beta - slope / curvature if curvature > 0.0 else low
        following = step if low < step < high else math.sqrt(low * high)
        if abs(following - beta) <= 1e-13 * beta:
            break
        beta = following
    return beta


def _slope(nats: Floats, beta: float) -> tuple[float, float]:
    """First and second derivative of the objective in β: mean of −x·σ(−βx) and of x²·σ(βx)·σ(−βx)."""
    wrong = sigmoid(-beta * nats)
    return mean(-nats * wrong), mean(nats * nats * wrong * (1.0 - wrong))


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


SATURATED = 0.01


def training_health(
    delta_chosen: Floats,
    delta_rejected: Floats,
    chosen_tokens: Floats,
    rejected_tokens: Floats,
    dpo_weight: Floats,
    clusters: Clusters | None = None,
) -> dict[str, Interval | None]:
    """Every number of DEFINITIONS with its interval; None where no pair has what it needs. Shapes (pairs,)."""
    both = np.isfinite(delta_chosen) & np.isfinite(delta_rejected)
    positive = both & (delta_chosen > delta_rejected)
    fell = delta_chosen < 0.0
    return {
        "displaced": _share(fell, np.isfinite(delta_chosen), clusters),
        "both_fell": _share(fell & (delta_rejected < 0.0), both, clusters),
        "drift_chosen": _mean(delta_chosen / chosen_tokens, clusters),
        "drift_rejected": _mean(delta_rejected / rejected_tokens, clusters),
        "pushed_only": _share(delta_chosen <= 0.0, positive, clusters),
        "saturated": _share(dpo_weight < SATURATED, np.isfinite(dpo_weight), clusters),
    }


def _share(holds: NDArray[np.bool_], among: NDArray[np.bool_], clusters: Clusters | None) -> Interval | None:
    if not among.any():
        return None
    return share_interval(holds[among].astype(np.float64), None if clusters is None else clusters[among])


def _mean(values: Floats, clusters: Clusters | None) -> Interval | None:
    there = np.isfinite(values)
    if not there.any():
        return None
    return mean_interval(values[there], None if clusters is None else clusters[there])


DEFINITIONS: Mapping[str, str] = {
    "loss": "mean of the configured loss over the pairs for which it is finite",
    "margins": "β(Δc − Δr), Δ = log π − log ρ of an answer: how much more the policy than the reference prefers "
    "chosen (DPO, arXiv 2305.18290)",
    "margins_nats": "Δc − Δr, the margin without β, in nats",
    "chosen_rewards": "βΔc, the implicit reward of the chosen answer (DPO, arXiv 2305.18290 section 4)",
    "rejected_rewards": "βΔr, the implicit reward of the rejected answer (DPO, arXiv 2305.18290 section 4)",
    "accuracy": "share of pairs with a positive margin among pairs without a tie (interval: Wilson 1927, or its "
    "cluster-robust form where a prompt or group repeats)",
    "ties": "pairs whose two rewards are exactly equal",
    "labelled_ties": "pairs that the data calls a tie: left out of accuracy",
    "rewards/chosen": "mean of βΔc, as TRL's DPOTrainer logs it",
    "rewards/rejected": "mean of βΔr, as TRL's DPOTrainer logs it",
    "rewards/accuracies": "share of pairs with a positive margin, a tie counting as wrong, as TRL's DPOTrainer logs it",
    "rewards/margins": "mean margin, as TRL's DPOTrainer logs it",
    "logps/chosen": "mean summed log-probability of chosen answers under the policy, as TRL's DPOTrainer logs it",
    "logps/rejected": "mean summed log-probability of rejected answers under the policy, as TRL's DPOTrainer logs it",
    "reference_sum": "share of pairs whose chosen answer is more probable under the reference alone (ranking "
    "accuracy, arXiv 2405.19534)",
    "reference_per_token": "the same by mean log-probability per token (arXiv 2405.19534)",
    "policy_sum": "share of pairs whose chosen answer is more probable under the policy alone (ranking accuracy, "
    "arXiv 2405.19534)",
    "policy_per_token": "the same by mean log-probability per token (arXiv 2405.19534)",
    "flipped_right": "pairs that the policy alone ranks right and the reference alone wrong (arXiv 2405.19534)",
    "flipped_wrong": "pairs that the policy alone ranks wrong and the reference alone right (arXiv 2405.19534)",
    "longer_wins": "accuracy of preferring the answer with more scored tokens, equal lengths left out",
    "shorter_wins": "accuracy of preferring the answer with fewer scored tokens, equal lengths left out",
    "truncated": "pairs of which at least one answer was cut",
    "without_truncated": "accuracy and margin over the pairs of which no answer was cut; null when none was cut",
    "macro": "mean over groups, each group counting once",
    "length_controlled_accuracy": "accuracy at equal lengths, from a logistic regression of the outcome on the "
    "length difference (after AlpacaEval 2, arXiv 2404.04475)",
    "pearson_margin_length": "correlation of the margin with nc − nr (Pearson 1895)",
    "spearman_margin_length": "rank correlation of the margin with nc − nr (Spearman 1904)",
    "ece": "mean gap between confidence max(σ(m), σ(−m)) and accuracy over ten bins, m the margin (arXiv 1706.04599)",
    "brier": "mean of (1 − σ(margin))² (Brier 1950)",
    "nll": "mean of −log σ(margin): the Bradley–Terry log-loss of the labels",
    "best_beta": "the β with the least mean −log σ(β(Δc − Δr)) (temperature scaling, arXiv 1706.04599)",
    "displaced": "share of pairs whose chosen log-prob fell below the reference, Δc < 0 (arXiv 2410.08847)",
    "both_fell": "share of pairs in which both answers lost probability, Δc < 0 and Δr < 0 (arXiv 2410.08847)",
    "drift_chosen": "mean of Δc/nc: nats per token that chosen answers gained (arXiv 2402.13228)",
    "drift_rejected": "mean of Δr/nr: nats per token that rejected answers gained (arXiv 2402.13228)",
    "pushed_only": "among pairs with a positive margin, the share with Δc ≤ 0: it comes from rejected alone",
    "saturated": f"share of pairs with a DPO weight σ(−margin) below {SATURATED} (arXiv 2305.18290, section 4)",
}


NOT_STORED = "a value that it needs is not stored for any pair"
NO_VARIATION = "one of the two does not vary"


def diagnose(rows: ScoreArrays) -> dict[str, Any]:
    """{"length": …, "calibration": …, "health": …} of one policy."""
    return {"length": _length(rows), "calibration": _calibration(rows), "health": _health(rows)}


def _length(rows: ScoreArrays) -> dict[str, Any]:
    v, margins = rows.values, _margins(rows)
    chosen, rejected = v["chosen_tokens"].astype(np.float64), v["rejected_tokens"].astype(np.float64)
    controlled = length_controlled_accuracy(margins, chosen, rejected, rows.repeated)
    found: dict[str, Any] = {
        "length_controlled_accuracy": {
            "n": controlled.n,
            "value": controlled.accuracy,
            "ci95": None if controlled.low is None else [controlled.low, controlled.high],
            "slope": controlled.slope,
        }
        | ({} if controlled.reason is None else {"reason": controlled.reason}),
    }
    for name, correlate in (("pearson", pearson), ("spearman", spearman)):
        value = correlate(margins, chosen - rejected)
        found[f"{name}_margin_length"] = {"value": value} | ({} if value is not None else {"reason": NO_VARIATION})
    return found


def _calibration(rows: ScoreArrays) -> dict[str, Any]:
    found = asdict(calibration(_margins(rows)))
    fit = asdict(best_beta(rows.values["margins_nats"]))
    return _without_empty_reason(found) | {"best_beta": _without_empty_reason(fit)}


def _health(rows: ScoreArrays) -> dict[str, Any]:
    v = rows.values
    delta_chosen = v["policy_chosen_logps"] - v["ref_chosen_logps"]
    delta_rejected = v["policy_rejected_logps"] - v["ref_rejected_logps"]
    found = training_health(
        delta_chosen, delta_rejected, v["chosen_tokens"], v["rejected_tokens"], v["dpo_weight"], rows.repeated
    )
    return {name: _interval(value) for name, value in found.items()}


def _interval(interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {"value": None, "ci95": None, "reason": NOT_STORED}
    bounds = None if interval.low is None else [interval.low, interval.high]
    found = {"value": interval.value, "ci95": bounds, "method": interval.method}
    return found if interval.reason is None else found | {"reason": interval.reason}


def _without_empty_reason(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "reason" or value is not None}


def _margins(rows: ScoreArrays) -> np.ndarray[Any, np.dtype[np.float64]]:
    """β-scaled margins; a labelled tie has no right answer, so it is left out."""
    margins = rows.values["chosen_rewards"] - rows.values["rejected_rewards"]
    return np.where(rows.flags["tied"], np.nan, margins)
