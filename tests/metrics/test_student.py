"""Student's t without SciPy: exact special cases, and SciPy's values where it is installed."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from dpo_score.metrics.student import normal_cdf, normal_quantile, t_quantile, t_two_sided_p


def test_one_degree_of_freedom_is_cauchy() -> None:
    for t in (0.1, 1.0, 12.7, 1e6):
        assert t_two_sided_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-8)


def test_two_degrees_of_freedom_in_closed_form() -> None:
    for t in (0.1, 1.0, 4.3, 50.0):
        assert t_two_sided_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


def test_many_degrees_of_freedom_are_normal() -> None:
    assert t_quantile(0.975, 1e9) == normal_quantile(0.975) == pytest.approx(1.959963984540054)
    assert t_two_sided_p(1.96, 1e6) == pytest.approx(2 * normal_cdf(-1.96), rel=1e-5)


@pytest.mark.parametrize("df", [1, 2, 3.5, 10, 99, 1e4])
def test_the_quantile_inverts_the_tail(df: float) -> None:
    for p in (0.6, 0.8, 0.975, 0.9995):
        assert t_two_sided_p(t_quantile(p, df), df) == pytest.approx(2 * (1 - p), rel=1e-9)
        assert t_quantile(1 - p, df) == pytest.approx(-t_quantile(p, df), rel=1e-9)
    assert t_quantile(0.5, df) == 0.0


def test_edges() -> None:
    assert t_two_sided_p(0.0, 5) == 1.0
    assert t_two_sided_p(math.inf, 5) == 0.0
    assert math.isnan(t_two_sided_p(math.nan, 5))
    assert math.isnan(t_two_sided_p(1.0, 0))


@pytest.mark.parametrize("df", [1, 2, 3.5, 7, 30, 299, 12345, 1e6])
def test_scipy_agrees(df: float) -> None:
    for t in (1e-3, 0.5, 1.96, 4.0, 30.0):
        assert t_two_sided_p(t, df) == pytest.approx(2 * stats.t.sf(t, df), rel=1e-8)
    for p in (0.55, 0.8, 0.975, 0.999):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-8)
