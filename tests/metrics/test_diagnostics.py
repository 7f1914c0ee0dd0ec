"""Diagnostics of one policy: calibration, length and training health, and what a summary says of them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import optimize, stats

from dpo_score.config.schema import LossSpec
from dpo_score.losses.columns import derive_table
from dpo_score.losses.parse import parse_loss
from dpo_score.metrics.diagnostics import (
    DEFINITIONS,
    LogisticFit,
    best_beta,
    calibration,
    length_controlled_accuracy,
    pearson,
    spearman,
    training_health,
)
from dpo_score.metrics.intervals import t_quantile, wilson
from dpo_score.metrics.summary import ranking, summarise
from tests.metrics.scored import scored


def simulated(n: int = 40_000, stretch: float = 1.0, seed: int = 0) -> np.ndarray:
    """Margins m of unsigned confidence σ(|m|), the label agreeing with that probability; then stretched."""
    rng = np.random.default_rng(seed)
    size = np.abs(rng.normal(0, 1.5, n))
    agrees = rng.random(n) < 1 / (1 + np.exp(-size))
    return stretch * np.where(agrees, size, -size)


def test_a_calibrated_policy_has_next_to_no_error() -> None:
    found = calibration(simulated())
    assert found.ece < 0.01
    assert sum(b.n for b in found.bins) == found.n == 40_000


def test_overconfidence_shows_as_error() -> None:
    assert calibration(simulated(stretch=4.0)).ece > 0.1


def test_by_hand() -> None:
    """Margins 0 (a tie: half right), ln 3 right, −ln 3 wrong: confidences ½, ¾, ¾."""
    found = calibration(np.array([0.0, math.log(3), -math.log(3), math.nan]), bins=2)
    assert [(b.low, b.high, b.n) for b in found.bins] == [(0.5, 0.75, 1), (0.75, 1.0, 2)]
    assert found.bins[1].confidence == pytest.approx(0.75)
    assert found.bins[1].accuracy == 0.5
    assert found.ece == pytest.approx((0.0 + 2 * 0.25) / 3)
    assert found.brier == pytest.approx((0.25 + 0.0625 + 0.5625) / 3)
    assert found.nll == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3)


def test_full_confidence_falls_in_the_last_bin() -> None:
    found = calibration(np.array([1e4, -1e4]))
    assert found.bins[-1].n == 2
    assert found.nll == 5000.0


@pytest.mark.parametrize("stretch", [0.2, 1.0, 10.0])
def test_the_best_beta_undoes_the_stretch(stretch: float) -> None:
    assert best_beta(simulated(stretch=stretch)).beta == pytest.approx(1 / stretch, rel=0.03)


def test_the_best_beta_is_a_minimum() -> None:
    nats = simulated(2000, stretch=5.0)
    fit = best_beta(nats)
    for factor in (0.98, 1.02):
        assert calibration(fit.beta * factor * nats).nll > fit.nll
    assert fit.nll == pytest.approx(calibration(fit.beta * nats).nll)


def test_where_no_beta_can_be_had() -> None:
    assert best_beta(np.zeros(5)).beta is None
    assert best_beta(np.array([math.nan])).reason == "no margin other than 0"
    worse = best_beta(np.array([-1.0, -2.0, 0.5]))
    assert (worse.beta, worse.nll) == (None, math.log(2))
    assert best_beta(np.array([1.0, 2.0])).at_edge
    assert calibration(np.array([math.nan])).reason == "no margin"


def test_scipy_agrees_on_the_best_beta() -> None:
    nats = simulated(3000, stretch=3.0, seed=1)
    found = optimize.minimize_scalar(lambda b: np.logaddexp(0, -b * nats).mean(), bounds=(1e-3, 10), method="bounded")
    assert best_beta(nats).beta == pytest.approx(found.x, rel=1e-3)


def lengths(n: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Chosen answers are 40 tokens longer on average."""
    rng = np.random.default_rng(seed)
    return rng.integers(40, 240, n) * 1.0, rng.integers(0, 200, n) * 1.0, rng


def test_baselines_are_complements_without_equal_lengths() -> None:
    made = scored("a", [1.0] * 4, lengths=[(3, 2), (5, 1), (2, 7), (4, 4)])
    found = ranking(made.rows)
    assert found["longer_wins"]["value"] == pytest.approx(2 / 3)
    assert found["shorter_wins"]["value"] == pytest.approx(1 / 3)


def test_a_policy_that_prefers_length_alone_has_no_accuracy_at_equal_length() -> None:
    chosen, rejected, rng = lengths()
    margin = (chosen - rejected) / 50 + rng.logistic(size=len(chosen))
    raw = float(np.mean(margin > 0))
    found = length_controlled_accuracy(margin, chosen, rejected)
    assert raw > 0.6
    assert found.low < 0.5 < found.high
    assert found.slope > 1


def test_a_policy_blind_to_length_keeps_its_accuracy() -> None:
    chosen, rejected, rng = lengths()
    margin = 1.0 + rng.logistic(size=len(chosen))
    found = length_controlled_accuracy(margin, chosen, rejected)
    assert found.accuracy == pytest.approx(1 / (1 + math.exp(-1)), abs=0.02)
    assert found.low < 1 / (1 + math.exp(-1)) < found.high


def test_repeated_pairs_do_not_narrow_the_interval() -> None:
    chosen, rejected, rng = lengths(200)
    margin = 0.5 + rng.logistic(size=200)
    once = length_controlled_accuracy(margin, chosen, rejected)
    tiled = [np.tile(x, 4) for x in (margin, chosen, rejected, np.arange(200))]
    four = length_controlled_accuracy(*tiled)
    assert four.high - four.low == pytest.approx(once.high - once.low, rel=0.02)


def test_few_or_separable_pairs() -> None:
    assert length_controlled_accuracy(np.ones(9), np.ones(9), np.zeros(9)).reason is not None
    separable = length_controlled_accuracy(np.ones(50), np.ones(50), np.ones(50))
    assert 0.9 < separable.accuracy <= 1.0
    assert math.isfinite(separable.low)


@pytest.mark.parametrize(("right", "n"), [(50, 50), (12, 12), (40, 50), (1, 30)])
def test_at_equal_lengths_throughout_the_interval_is_wilsons(right: int, n: int) -> None:
    margin = np.repeat([1.0, -1.0], [right, n - right])
    found = length_controlled_accuracy(margin, np.ones(n), np.ones(n))
    expected = wilson(right, n, t_quantile(0.975, n - 1))
    assert (found.low, found.high) == (pytest.approx(expected[0], abs=1e-3), pytest.approx(expected[1], abs=1e-3))


def test_all_right_is_not_certain() -> None:
    rng = np.random.default_rng(3)
    chosen, rejected = rng.integers(20, 200, (2, 140)) * 1.0
    found = length_controlled_accuracy(np.ones(140), chosen, rejected)
    assert found.low == pytest.approx(wilson(140, 140)[0], abs=2e-3)
    assert found.high == pytest.approx(1.0)
    longer = length_controlled_accuracy(np.ones(140), rejected + 50, rejected)
    assert longer.accuracy is None, "no pair says what happens at equal length"
    assert "chosen is longer in 100 % of the pairs" in str(longer.reason)


def test_pairs_of_one_prompt_have_no_interval() -> None:
    found = length_controlled_accuracy(np.ones(12), np.ones(12), np.ones(12), np.zeros(12))
    assert (found.low, found.high) == (None, None)
    assert found.accuracy is not None
    assert "one prompt" in str(found.reason)


def test_prompts_that_were_all_right_count_once_each() -> None:
    copies = length_controlled_accuracy(np.ones(60), np.ones(60), np.ones(60), np.repeat(np.arange(12), 5))
    assert copies.low == pytest.approx(wilson(12, 12, t_quantile(0.975, 11))[0], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("log_odds", "slope", "n"), [(3.9, 0.0, 140), (2.2, 1.0, 140), (0.4, 1.0, 60)])
def test_the_interval_at_equal_length_covers(log_odds: float, slope: float, n: int) -> None:
    """98 %, 90 % and 60 % right: errors of the log-odds alone would cover 83 % of the first."""
    rng, hits, tried = np.random.default_rng(4), 0, 0
    truth = 1.0 / (1.0 + math.exp(-log_odds))
    for _ in range(250):
        chosen, rejected = rng.integers(40, 240, n) * 1.0, rng.integers(20, 220, n) * 1.0
        gap = chosen - rejected
        feature = np.tanh(gap / math.sqrt(float(np.mean(gap * gap))))
        right = rng.random(n) < 1.0 / (1.0 + np.exp(-log_odds - slope * feature))
        found = length_controlled_accuracy(np.where(right, 1.0, -1.0), chosen, rejected)
        if found.low is None or found.high is None:  # lengths that say too little: no interval is claimed
            continue
        tried += 1
        hits += found.low <= truth <= found.high
    assert tried >= 200
    assert hits / tried >= 0.92


def test_correlations_by_hand() -> None:
    x, y = np.array([1.0, 2.0, 3.0, math.nan]), np.array([2.0, 4.0, 6.0, 1.0])
    assert pearson(x, y) == 1.0
    assert pearson(x, -y) == -1.0
    assert spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 8.0, 27.0, 64.0])) == 1.0
    assert pearson(np.ones(3), np.arange(3.0)) is None
    assert spearman(np.array([5.0, 1.0, 5.0]), np.array([2.0, 1.0, 2.0])) == pytest.approx(1.0), (
        "equal values share a rank"
    )


def test_scipy_agrees_on_correlations() -> None:
    x, y = np.random.default_rng(1).integers(0, 9, (2, 60)) * 1.0
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_logistic_regression_recovers_its_coefficients() -> None:
    rng = np.random.default_rng(2)
    feature = rng.normal(size=20_000)
    outcome = (rng.random(20_000) < 1 / (1 + np.exp(-(0.4 - 0.8 * feature)))) * 1.0
    fit = LogisticFit.of(feature, outcome)
    assert np.all(np.abs(np.array([fit.intercept, fit.slope]) - [0.4, -0.8]) < 4 * np.array([0.015, 0.017]))
    assert fit.score(fit.intercept) == pytest.approx(0.0, abs=1e-6)
    assert fit.intercept - fit.bound(-1.0) == pytest.approx(0.015, abs=0.005), "one standard error"


NAN = math.nan


def test_every_number_by_hand() -> None:
    delta_chosen, delta_rejected = np.array([1.0, -1.0, -2.0, 0.0]), np.array([-1.0, -3.0, 1.0, -2.0])
    weight = np.array([0.5, 0.001, 0.002, 0.4])
    found = training_health(delta_chosen, delta_rejected, np.array([2.0, 1.0, 4.0, 3.0]), np.full(4, 2.0), weight)
    six = {"displaced", "both_fell", "drift_chosen", "drift_rejected", "pushed_only", "saturated"}
    assert found.keys() == six
    assert six <= DEFINITIONS.keys()
    assert {name: None if value is None else value.value for name, value in found.items()} == {
        "displaced": 0.5,
        "both_fell": 0.25,
        "drift_chosen": pytest.approx((0.5 - 1.0 - 0.5 + 0.0) / 4),
        "drift_rejected": pytest.approx((-0.5 - 1.5 + 0.5 - 1.0) / 4),
        "pushed_only": pytest.approx(2 / 3),
        "saturated": 0.5,
    }


def test_rows_with_holes_are_left_out_of_what_needs_them() -> None:
    found = training_health(
        np.array([NAN, -1.0]), np.array([1.0, NAN]), np.ones(2), np.array([NAN, 1.0]), np.full(2, NAN)
    )
    assert found["displaced"].value == 1.0
    assert found["both_fell"] is None
    assert found["drift_rejected"] is None
    assert found["saturated"] is None


def test_clusters_reach_the_intervals() -> None:
    delta = np.array([1.0, -1.0] * 10)
    found = training_health(delta, -delta, np.ones(20), np.ones(20), np.full(20, 0.5), np.repeat(np.arange(10), 2))
    assert found["displaced"].method == "cluster-robust Clopper-Pearson (Korn-Graubard)"
    assert found["drift_chosen"].method == "cluster-robust t"


def table(n: int = 300, reference: bool = True, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns: dict[str, Any] = {"dataset": ["d"] * n}
    for side, shift in (("chosen", 3.0), ("rejected", -3.0)):
        ref = -rng.gamma(5.0, 8.0, n)
        columns[f"policy_{side}_logps"] = np.minimum(ref + shift + rng.normal(0, 10, n), -0.1)
        columns[f"{side}_tokens"] = rng.integers(1, 60, n)
        columns |= {f"ref_{side}_logps": ref} if reference else {}
    return pa.table(columns)


def diagnosis(scores: pa.Table, **spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = summarise([derive_table(scores, parse_loss(LossSpec(**spec)))])["diagnosis"]
    return found


def test_it_holds_what_the_parts_say() -> None:
    found = diagnosis(table())
    scores = derive_table(table(), parse_loss(LossSpec()))
    assert found["calibration"]["ece"] == calibration(np.asarray(scores["margins"])).ece
    assert found["calibration"]["best_beta"]["beta"] == best_beta(np.asarray(scores["margins_nats"])).beta
    delta = np.asarray(scores["policy_chosen_logps"]) - np.asarray(scores["ref_chosen_logps"])
    assert found["health"]["displaced"]["value"] == pytest.approx(float(np.mean(delta < 0)))
    drift = np.mean(delta / np.asarray(scores["chosen_tokens"]))
    assert found["health"]["drift_chosen"]["value"] == pytest.approx(float(drift))
    assert abs(found["length"]["pearson_margin_length"]["value"]) < 0.2


def test_labelled_ties_are_left_out_of_calibration() -> None:
    tied = table().append_column("tied", pa.array([True] * 100 + [False] * 200))
    assert diagnosis(tied)["calibration"]["n"] == 200


def test_without_a_reference_health_is_null_with_a_reason() -> None:
    found = diagnosis(table(reference=False), name="cpo")
    assert found["health"]["displaced"]["value"] is None
    assert "not stored" in found["health"]["displaced"]["reason"]
    assert found["calibration"]["best_beta"]["beta"] is None


def test_an_empty_policy_is_strict_json() -> None:
    json.dumps(summarise([]), allow_nan=False)
    json.dumps(diagnosis(table(3)), allow_nan=False)


STRUCTURE = """
    n scored rejected clustered effective largest ranking mean std ci95 quantiles overflow value method reason beta
    at_edge bins low high confidence slope groups p5 p25 p50 p75 p95 length calibration health
"""


def names(found: Any) -> set[str]:
    if isinstance(found, list | tuple):
        return set().union(*map(names, found))
    if isinstance(found, dict):
        return set(found) | set().union(*map(names, found.values()))
    return set()


def test_every_number_of_a_summary_is_defined_in_a_sentence() -> None:
    summary = summarise([derive_table(table(), parse_loss(LossSpec()))])
    found = names([summary["overall"], summary["diagnosis"]]) | {"macro"}
    assert found - set(STRUCTURE.split()) <= set(DEFINITIONS)
    assert set(DEFINITIONS) <= found
