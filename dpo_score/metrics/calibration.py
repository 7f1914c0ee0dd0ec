"""Do margins mean what they say? σ(margin) as a probability that the label is right. Pure NumPy.

Under the Bradley–Terry model that DPO fits, P(chosen ≻ rejected) = σ(β(Δc − Δr)). A labelled pair always shows
"chosen won", so orientation carries the outcome: confidence is max(σ, 1 − σ) and the outcome is whether the policy
ranks the pair as labelled. Margins that are NaN are left out; ties have confidence ½ and count half right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpo_score.losses.ops import Floats, log_sigmoid, sigmoid
from dpo_score.metrics.intervals import mean, total

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
