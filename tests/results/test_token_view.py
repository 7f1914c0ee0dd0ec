"""Token values add up to the reward of their side, and map to few colours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_score.results.token_view import LEVELS, level, scale_of, token_shares

logps = st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), max_size=20)


@given(logps, st.floats(0.01, 2.0))
def test_values_add_up_to_the_reward(tokens: list[tuple[float, float]], beta: float) -> None:
    policy, reference = [p for p, _ in tokens], [r for _, r in tokens]
    assert token_shares(policy, reference, beta).sum() == pytest.approx(beta * (sum(policy) - sum(reference)))


def test_lists_of_two_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 policy values but 1"):
        token_shares([0.0, 1.0], [0.0], 0.1)


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6))
def test_a_colour_has_the_sign_of_its_value_and_grows_with_it(value: float, scale: float) -> None:
    found = level(value, scale)
    assert -LEVELS <= found <= LEVELS
    assert found * value >= 0
    assert abs(level(2 * value, scale)) >= abs(found)


def test_the_scale_ignores_outliers_and_is_never_zero() -> None:
    assert scale_of(np.zeros(3)) > 0
    assert scale_of() > 0
    assert scale_of(np.array([*[0.1] * 99, 50.0])) == pytest.approx(0.1)
    assert level(float("nan"), 1.0) == 0
