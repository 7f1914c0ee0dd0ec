"""Why a policy scores as it does: length, calibration and training health of its scored rows, and what each number
of a summary means.

In: the rows of one policy as arrays. Out: strict JSON, null with a reason where a number cannot be computed.
`DEFINITIONS` has a sentence and a source for every number of summary.json; reports show it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from dpo_score.losses.ops import Floats, log_sigmoid, sigmoid
from dpo_score.metrics.arrays import ScoreArrays
from dpo_score.metrics.intervals import (
    LEVEL,
    ONE_GROUP,
    Clusters,
    Interval,
    mean,
    mean_interval,
    mean_test,
    repeats,
    share_interval,
    t_quantile,
    total,
)

SATURATED = 0.01
DEFINITIONS: Mapping[str, str] = {
    "loss": "mean of the configured loss over the pairs for which it is finite",
    "margins": "β(Δc − Δr), Δ = log π − log ρ of an answer: how much more the policy than the reference prefers "
    "chosen (DPO, arXiv 2305.18290)",
    "margins_nats": "Δc − Δr, the margin without β, in nats",
    "chosen_rewards": "βΔc, the implicit reward of the chosen answer (DPO, arXiv 2305.18290 section 4)",
    "rejected_rewards": "βΔr, the implicit reward of the rejected answer (DPO, arXiv 2305.18290 section 4)",
    "accuracy": "share of pairs with a positive margin among pairs without a tie (interval: Wilson 1927; Korn and "
    "Graubard 1998 where a prompt or group repeats)",
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
    "clusters": "groups of pairs that share a prompt (but for case and spaces) or a group_id: how many, how many of "
    "equal size would be as unevenly filled (n²/Σn_g², Kish 1965), and the share of pairs in the largest",
    "macro": "mean over groups, each group counting once",
    "length_controlled_accuracy": "accuracy at equal lengths, from a logistic regression of the outcome on the "
    "length difference (after AlpacaEval 2, arXiv 2404.04475); null where the two lengths do not overlap",
    "pearson_margin_length": "correlation of the margin with nc − nr (Pearson 1895)",
    "spearman_margin_length": "rank correlation of the margin with nc − nr (Spearman 1904)",
    "ece": "mean gap between confidence max(σ(m), σ(−m)) and accuracy over ten bins, m the margin (arXiv 1706.04599)",
    "ece_ci95": "95 % interval of ece: the gaps, shrunk or grown together, under which the ece that was seen is not "
    "unusual",
    "ece_if_calibrated": "the ece that a perfectly calibrated policy shows on average with these confidences and so "
    "many pairs: it falls only as more pairs are scored",
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
    return {
        "length": length_diagnosis(rows),
        "calibration": calibration_diagnosis(rows),
        "health": health_diagnosis(rows),
    }


def length_diagnosis(rows: ScoreArrays) -> dict[str, Any]:
    """The accuracy at equal lengths, and how the margin goes with the difference of the lengths."""
    v, margins = rows.values, _margins(rows)
    chosen, rejected = v["chosen_tokens"].astype(np.float64), v["rejected_tokens"].astype(np.float64)
    controlled = length_controlled_accuracy(margins, chosen, rejected, rows.repeated)
    found: dict[str, Any] = {
        "length_controlled_accuracy": _with_reason(
            {
                "n": controlled.n,
                "value": controlled.accuracy,
                "ci95": None if controlled.low is None else [controlled.low, controlled.high],
                "slope": controlled.slope,
                "reason": controlled.reason,
            }
        )
    }
    for name, correlate in (("pearson", pearson), ("spearman", spearman)):
        value = correlate(margins, chosen - rejected)
        reason = NO_VARIATION if value is None else None
        found[f"{name}_margin_length"] = _with_reason({"value": value, "reason": reason})
    return found


def calibration_diagnosis(rows: ScoreArrays) -> dict[str, Any]:
    """The calibration of the margins as they are, and the β that would fit best."""
    found = calibration(_margins(rows), clusters=rows.repeated)
    fit = asdict(best_beta(rows.values["margins_nats"]))
    return _with_reason(asdict(found)) | {"best_beta": _with_reason(fit)}


def health_diagnosis(rows: ScoreArrays) -> dict[str, Any]:
    """What training did to the log-probabilities of both answers."""
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
    return _with_reason({"value": interval.value, "ci95": bounds, "method": interval.method, "reason": interval.reason})


def _with_reason(found: dict[str, Any]) -> dict[str, Any]:
    """The cell, with its reason only where there is one."""
    return {key: value for key, value in found.items() if key != "reason" or value is not None}


def _margins(rows: ScoreArrays) -> Floats:
    """β-scaled margins; a labelled tie has no right answer, so it is left out."""
    margins = rows.values["chosen_rewards"] - rows.values["rejected_rewards"]
    return np.where(rows.flags["tied"], np.nan, margins)


# --- calibration: do margins mean what they say? ---------------------------------------------------------------------

BETA_RANGE = (1e-4, 1e2)
DRAWS = 2000


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
    """`ece`: expected calibration error; `brier`: mean squared error of σ(margin) against 1; `nll`: mean −log σ.

    `ece_if_calibrated`: what a perfectly calibrated policy shows on average at this n. See DEFINITIONS.
    """

    n: int
    ece: float | None
    ece_ci95: tuple[float, float] | None
    ece_if_calibrated: float | None
    brier: float | None
    nll: float | None
    bins: tuple[Bin, ...]
    reason: str | None = None


def calibration(margins: Floats, bins: int = 10, clusters: Clusters | None = None) -> Calibration:
    """Reliability over equal bins of confidence in [½, 1]; ECE = Σ n_b/n·|accuracy − confidence|.

    Under the Bradley–Terry model that DPO fits, P(chosen ≻ rejected) = σ(β(Δc − Δr)). A labelled pair always says
    "chosen won", so the confidence is max(σ, 1 − σ) and the outcome is whether the policy ranks the pair as labelled;
    a tie has confidence ½ and counts half right. Guo et al., arXiv 1706.04599 eq. 3. `margins`: β-scaled, shape
    (pairs,), NaN left out.
    """
    there = np.isfinite(margins)
    kept, groups = margins[there], None if clusters is None else clusters[there]
    if not len(kept):
        return Calibration(0, None, None, None, None, None, (), "no margin")
    confidence = sigmoid(np.abs(kept))
    right = np.where(kept > 0.0, 1.0, np.where(kept < 0.0, 0.0, 0.5))
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    edges = np.linspace(0.5, 1.0, bins + 1)
    found = [_bin(confidence[index == b], right[index == b], float(edges[b]), float(edges[b + 1])) for b in range(bins)]
    gaps = [b.n * abs(b.accuracy - b.confidence) for b in found if b.accuracy is not None and b.confidence is not None]
    ece, miss = math.fsum(gaps) / len(kept), 1.0 - sigmoid(kept)
    ci95, expected = _calibration_error(confidence, right, index, groups)
    return Calibration(len(kept), ece, ci95, expected, mean(miss * miss), mean(-log_sigmoid(kept)), tuple(found))


def _bin(confidence: Floats, right: Floats, low: float, high: float) -> Bin:
    if not len(confidence):
        return Bin(low, high, 0, None, None)
    return Bin(low, high, len(confidence), mean(confidence), mean(right))


def _calibration_error(
    confidence: Floats, right: Floats, index: NDArray[np.int_], clusters: Clusters | None
) -> tuple[tuple[float, float], float]:
    """The interval of the ECE, and its mean for a perfectly calibrated policy.

    The ECE is a sum of absolute values, so noise alone makes it positive. Each bin's gap d_b is taken as normal. The
    true gaps are taken to be λ·d_b, with the variance c(1 − c) of a calibrated pair at λ = 0 and the one that was seen
    from λ = 1 on, times the design effect of the clusters. The interval holds every λ under which the ECE that was seen
    lies in the middle 95 % of DRAWS normal draws (fixed seed).
    """
    n, size = len(confidence), np.bincount(index)
    residuals = right - confidence
    centred = residuals - (np.bincount(index, residuals) / np.maximum(size, 1))[index]
    calibrated = np.bincount(index, confidence * (1.0 - confidence))[size > 0]
    observed = np.maximum(np.bincount(index, centred * centred)[size > 0], calibrated)
    gaps, effect = np.bincount(index, residuals)[size > 0] / n, _clustering(residuals, clusters)
    drawn = np.random.default_rng(0).standard_normal((DRAWS, len(gaps))) * math.sqrt(effect) / n
    seen = float(np.abs(gaps).sum())

    def errors(scale: float) -> Floats:
        """ECEs as they are drawn where the true gaps are λ·d."""
        share = min(scale, 1.0)
        noise = np.sqrt((1.0 - share) * calibrated + share * observed)
        found: Floats = np.abs(scale * gaps + drawn * noise).sum(axis=1)
        return found

    tail = (1.0 - LEVEL) / 2
    shrunk = np.linspace(0.0, 1.0, 41)
    grown = np.concatenate([1.0 + shrunk, np.geomspace(2.1, 100.0, 40)])
    low = next((s for s in shrunk if np.mean(errors(s) >= seen) > tail), 1.0)
    high = next((s for s in grown if np.mean(errors(s) <= seen) < tail), 100.0)
    return (float(low) * seen, min(1.0, float(high) * seen)), float(errors(0.0).mean())


def _clustering(residuals: Floats, clusters: Clusters | None) -> float:
    """The design effect: how much clusters widen the variance of the mean residual, at least 1."""
    if clusters is None or not repeats(clusters):
        return 1.0
    among, alone = mean_test(residuals, clusters), mean_test(residuals)
    return max(1.0, (among.error / alone.error) ** 2) if among.error and alone.error else 1.0


@dataclass(frozen=True, slots=True)
class BetaFit:
    """The β with the least mean −log σ(β·nats). `at_edge`: the likelihood still falls at the end of the range."""

    beta: float | None
    nll: float | None
    at_edge: bool
    reason: str | None = None


def best_beta(margins_nats: Floats) -> BetaFit:
    """argmin_β mean −log σ(β·(Δc − Δr)): the maximum-likelihood temperature of the Bradley–Terry model.

    Temperature scaling, arXiv 1706.04599 §4.2, with β = 1/T. The objective is convex in β, so its slope has one root.
    Null when every margin is 0, or when the mean margin is not positive (then β → 0 fits best: the policy knows no
    better than chance).
    """
    kept = margins_nats[np.isfinite(margins_nats)]
    if not len(kept) or not kept.any():
        return BetaFit(None, None, False, "no margin other than 0")
    if total(kept) <= 0.0:
        return BetaFit(None, math.log(2.0), True, "the mean margin is not positive: no beta beats chance")

    def slope(beta: float) -> float:
        return mean(-kept * sigmoid(-beta * kept))

    low, high = BETA_RANGE
    if slope(low) >= 0.0 or slope(high) <= 0.0:
        beta, at_edge = (low if slope(low) >= 0.0 else high), True
    else:
        beta, at_edge = float(scipy.optimize.brentq(slope, low, high, xtol=1e-15, rtol=1e-13)), False
    return BetaFit(beta, mean(-log_sigmoid(beta * kept)), at_edge)


# --- length: is it preference, or length? ----------------------------------------------------------------------------

RIDGE = 1e-3
ALIKE = 0.1
"""Lengths that differ by less than this share of the longer one are about equal."""
FEWEST_ALIKE, LEAST_ALIKE = 5, 0.02
"""Pairs of about equal length that an accuracy at equal length needs at least: so many, and this share of all."""
ONE_SIGN = 0.95


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """`accuracy` at equal length; `slope`: log-odds of ranking right per standard deviation of length difference."""

    accuracy: float | None
    low: float | None
    high: float | None
    slope: float | None
    n: int
    reason: str | None = None


def pearson(x: Floats, y: Floats) -> float | None:
    """Correlation of the pairs that both have. Pearson 1895. None when either does not vary."""
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there] - mean(x[there]), y[there] - mean(y[there])
    scale = math.sqrt(total(x * x) * total(y * y))
    return None if scale == 0.0 or len(x) < 2 else max(-1.0, min(1.0, total(x * y) / scale))


def spearman(x: Floats, y: Floats) -> float | None:
    """Pearson's correlation of the ranks, equal values sharing theirs. Spearman 1904."""
    there = np.isfinite(x) & np.isfinite(y)
    return pearson(scipy.stats.rankdata(x[there]), scipy.stats.rankdata(y[there]))


def length_controlled_accuracy(
    margin: Floats, chosen_tokens: Floats, rejected_tokens: Floats, clusters: Clusters | None = None
) -> LengthControlled:
    """P(chosen ranked first) if both answers had one length, after AlpacaEval 2 (arXiv 2404.04475).

    A logistic regression of the outcome on tanh((nc − nr)/sd), read at 0. Its score interval (Rao 1948) holds where few
    pairs are ranked wrong, or none; clusters widen it by their design effect. Ties are left out. A weak ridge of 1e-3
    keeps separable data finite. Null where lengths do not overlap: it would be an extrapolation.
    """
    there = np.isfinite(margin) & (margin != 0.0) & np.isfinite(chosen_tokens) & np.isfinite(rejected_tokens)
    gap, right = (chosen_tokens - rejected_tokens)[there], (margin[there] > 0.0) * 1.0
    n = len(right)
    reason = _no_overlap(gap, np.maximum(chosen_tokens, rejected_tokens)[there])
    if reason is not None:
        return LengthControlled(None, None, None, None, n, reason)
    spread = math.sqrt(total(gap * gap) / n)
    fit = LogisticFit.of(np.tanh(gap / spread) if spread > 0.0 else gap, right)
    value, slope = float(sigmoid(np.float64(fit.intercept))), fit.slope
    kept = None if clusters is None else clusters[there]
    effect, df = fit.design_effect(kept)
    if df < 1.0:
        return LengthControlled(value, None, None, slope, n, ONE_GROUP)
    limit = math.sqrt(effect) * t_quantile(0.5 + LEVEL / 2, df)
    low, high = (float(sigmoid(np.float64(fit.bound(side * limit)))) for side in (-1.0, 1.0))
    return LengthControlled(value, low, high, slope, n)


def _no_overlap(gap: Floats, longer: Floats) -> str | None:
    """Why nothing can be said of answers of equal length, or None."""
    if len(gap) < 10:
        return "fewer than ten pairs without a tie"
    alike, n = int(np.sum(np.abs(gap) < ALIKE * longer)), len(gap)
    for word, share in (("longer", float(np.mean(gap > 0.0))), ("shorter", float(np.mean(gap < 0.0)))):
        if share > ONE_SIGN:
            return f"chosen is {word} in {100 * share:.0f} % of the pairs: lengths do not overlap"
    if alike < max(FEWEST_ALIKE, LEAST_ALIKE * n):
        return f"only {alike:,} of {n:,} pairs have lengths within {100 * ALIKE:.0f} %: lengths do not overlap"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class LogisticFit:
    """Outcome on intercept and one feature, with a weak ridge; pairs of equal feature are counted together.

    `feature`, `pairs`, `right`: shapes (different values,), `right` those ranked right. `place`: each pair's value.
    """

    feature: Floats
    pairs: Floats
    right: Floats
    place: NDArray[np.int64]
    outcome: Floats
    intercept: float
    slope: float

    @classmethod
    def of(cls, feature: Floats, outcome: Floats) -> LogisticFit:
        """Newton's method on the penalised likelihood, which is concave."""
        different, place = np.unique(feature, return_inverse=True)
        pairs, right = np.bincount(place).astype(np.float64), np.bincount(place, outcome).astype(np.float64)
        weights = np.zeros(2)
        design = np.stack([np.ones_like(different), different], axis=1)
        for _ in range(50):
            fitted = sigmoid(design @ weights)
            curvature = (design * (pairs * fitted * (1.0 - fitted))[:, None]).T @ design + RIDGE * np.eye(2)
            step = np.linalg.solve(curvature, design.T @ (right - pairs * fitted) - RIDGE * weights)
            weights = weights + step
            if float(np.abs(step).max()) < 1e-10:
                break
        return cls(different, pairs, right, place, outcome, float(weights[0]), float(weights[1]))

    def design_effect(self, clusters: Clusters | None) -> tuple[float, float]:
        """How much clusters widen the variance of the intercept, at least 1, and the degrees of freedom left.

        The intercept is, to first order, the mean of each pair's influence: rows of the inverse curvature times its
        part in the slope of the likelihood (White 1982).
        """
        fitted = sigmoid(self.intercept + self.slope * self.feature)
        weight = self.pairs * fitted * (1.0 - fitted)
        moments = [float(np.sum(weight * self.feature**power)) for power in (0, 1, 2)]
        bread = np.linalg.inv(np.array([moments[:2], moments[1:]]) + RIDGE * np.eye(2))[0]
        influence = (bread[0] + bread[1] * self.feature)[self.place] * (self.outcome - fitted[self.place])
        if clusters is None or not repeats(clusters):
            return 1.0, float(len(influence) - 1)
        among, alone = mean_test(influence, clusters), mean_test(influence)
        effect = max(1.0, (among.error / alone.error) ** 2) if among.error and alone.error else 1.0
        if among.error is not None and among.error == 0.0:
            effect = len(influence) / (among.df + 1.0)
        return effect, among.df

    def score(self, intercept: float) -> float:
        """The likelihood's slope in the intercept in standard errors, at the best slope of length: 0 at the fit."""
        fitted = sigmoid(intercept + self._best_slope(intercept) * self.feature)
        rise = float(np.sum(self.right - self.pairs * fitted)) - RIDGE * intercept
        weight = self.pairs * fitted * (1.0 - fitted)
        level, cross = float(np.sum(weight)) + RIDGE, float(np.sum(weight * self.feature))
        return rise / math.sqrt(level - cross * cross / (float(np.sum(weight * self.feature**2)) + RIDGE))

    def _best_slope(self, intercept: float) -> float:
        """The likeliest slope given the intercept."""

        def rise(slope: float) -> float:
            fitted = sigmoid(intercept + slope * self.feature)
            return float(np.sum(self.feature * (self.right - self.pairs * fitted))) - RIDGE * slope

        reach = 1.0
        while rise(-reach) < 0.0 or rise(reach) > 0.0:
            reach *= 4.0
        return float(scipy.optimize.brentq(rise, -reach, reach, xtol=1e-9, rtol=1e-9))

    def bound(self, limit: float) -> float:
        """The intercept above the fit (limit > 0) or below it whose score is −limit. Rao 1948.

        With equal lengths throughout this is Wilson's interval on the log-odds.
        """
        step = math.copysign(1.0, limit)
        while abs(self.score(self.intercept + step)) <= abs(limit):
            step *= 2.0
        ends = sorted((self.intercept, self.intercept + step))
        return float(scipy.optimize.brentq(lambda at: self.score(at) + limit, *ends, xtol=1e-9, rtol=1e-9))


# --- health: what training did to both answers -----------------------------------------------------------------------


def training_health(
    delta_chosen: Floats,
    delta_rejected: Floats,
    chosen_tokens: Floats,
    rejected_tokens: Floats,
    dpo_weight: Floats,
    clusters: Clusters | None = None,
) -> dict[str, Interval | None]:
    """From displaced to saturated of DEFINITIONS, each with its interval; None where no pair has what it needs.

    Δ = log π − log ρ in nats; all shapes (pairs,). A pair with a missing value is left out of the number that needs it.
    """
    both = np.isfinite(delta_chosen) & np.isfinite(delta_rejected)
    positive = both & (delta_chosen > delta_rejected)
    fell = delta_chosen < 0.0

    def share(holds: NDArray[np.bool_], among: NDArray[np.bool_]) -> Interval | None:
        kept = None if clusters is None else clusters[among]
        return share_interval(holds[among].astype(np.float64), kept) if among.any() else None

    def average(values: Floats) -> Interval | None:
        there = np.isfinite(values)
        kept = None if clusters is None else clusters[there]
        return mean_interval(values[there], kept) if there.any() else None

    return {
        "displaced": share(fell, np.isfinite(delta_chosen)),
        "both_fell": share(fell & (delta_rejected < 0.0), both),
        "drift_chosen": average(delta_chosen / chosen_tokens),
        "drift_rejected": average(delta_rejected / rejected_tokens),
        "pushed_only": share(delta_chosen <= 0.0, positive),
        "saturated": share(dpo_weight < SATURATED, np.isfinite(dpo_weight)),
    }
