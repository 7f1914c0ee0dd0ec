"""Training health: each number on a set small enough to count by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpo_score.metrics.health import DEFINITIONS, training_health

NAN = math.nan


def test_every_number_by_hand() -> None:
    delta_chosen, delta_rejected = np.array([1.0, -1.0, -2.0, 0.0]), np.array([-1.0, -3.0, 1.0, -2.0])
    weight = np.array([0.5, 0.001, 0.002, 0.4])
    found = training_health(delta_chosen, delta_rejected, np.array([2.0, 1.0, 4.0, 3.0]), np.full(4, 2.0), weight)
    assert found.keys() == DEFINITIONS.keys()
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
    assert found["displaced"].method == "cluster-robust Wilson"
    assert found["drift_chosen"].method == "cluster-robust t"
