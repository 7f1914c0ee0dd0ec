"""Calibration: perfect where outcomes follow σ(margin), wrong by as much as the margins were stretched."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from dpo_score.metrics.calibration import best_beta, calibration


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
