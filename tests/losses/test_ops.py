"""The primitives keep their precision where the naive formula loses it, in NumPy and torch alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dpo_score.losses.ops import Dual, clamp_max, exp, log1mexp, log_sigmoid, rank_partner, relu, sigmoid

POINTS = np.array([-800.0, -40.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 40.0, 800.0])


def test_log_sigmoid_far_out() -> None:
    assert log_sigmoid(np.array([-800.0]))[0] == -800.0
    assert log_sigmoid(np.array([40.0]))[0] == pytest.approx(-math.exp(-40), rel=1e-12)
    assert log_sigmoid(np.array([0.0]))[0] == -0.6931471805599453


def test_sigmoid_keeps_relative_precision_in_the_tail() -> None:
    assert sigmoid(np.array([-700.0]))[0] == pytest.approx(math.exp(-700), rel=1e-14)
    assert sigmoid(np.array([0.0]))[0] == 0.5


@pytest.mark.parametrize("x", [-1e-10, -1e-3, -math.log(2), -0.7, -30.0, -745.0])
def test_log1mexp(x: float) -> None:
    exact = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
    assert log1mexp(np.array([x]))[0] == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("function", [sigmoid, log_sigmoid, exp, relu, log1mexp])
def test_numpy_torch_and_derivative_agree(function: object) -> None:
    limit = 0 if function is log1mexp else 30  # beyond, torch rounds σ(1 − σ) to 0
    points = POINTS[limit > POINTS]
    tensor = torch.tensor(points, requires_grad=True)
    result = function(tensor)  # type: ignore[operator]
    result.sum().backward()
    dual = function(Dual.seed(points))  # type: ignore[operator]
    assert dual.value == pytest.approx(result.detach().numpy(), rel=1e-14, abs=1e-300)
    assert dual.slope == pytest.approx(tensor.grad.numpy(), rel=1e-12, abs=1e-300)
    assert np.array_equal(dual.value, function(points))  # type: ignore[operator]


def test_torch_log1mexp_has_no_nan_gradient_next_to_zero() -> None:
    x = torch.tensor([-1e-17, -1e-300, -50.0], dtype=torch.float64, requires_grad=True)
    log1mexp(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_clamp_max_has_slope_one_up_to_the_limit() -> None:
    dual = clamp_max(Dual.seed(np.array([1.0, 2.0, 3.0])), 2.0)
    assert dual.value.tolist() == [1.0, 2.0, 2.0]
    assert dual.slope.tolist() == [1.0, 1.0, 0.0]


def test_partners_are_looked_up_by_value_whatever_is_differentiated() -> None:
    x, other = np.array([2.0, 1.0]), np.array([10.0, 20.0])
    assert rank_partner(Dual(x, np.ones(2)), Dual(other, np.ones(2))).tolist() == [20.0, 10.0]


def test_rank_partner_pairs_by_rank() -> None:
    x, other = np.array([3.0, 1.0, 2.0]), np.array([10.0, 30.0, 20.0])
    assert rank_partner(x, other).tolist() == [30.0, 10.0, 20.0]
    assert rank_partner(torch.tensor(x), torch.tensor(other)).tolist() == [30.0, 10.0, 20.0]


def test_dual_arithmetic_is_the_chain_rule() -> None:
    x = Dual.seed(np.array([2.0]))
    y = 3.0 - (x * x - np.array([1.0])) / 2.0 + (1.0 - x) * np.array([4.0]) - x
    assert y.value[0] == 3 - 1.5 - 4 - 2
    assert y.slope[0] == -2 - 4 - 1
