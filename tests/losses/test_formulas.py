"""Loss formulas: answers by hand, NumPy and torch alike, exact derivatives, and what must hold for any numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.config.schema import LossSpec
from dpo_score.losses.columns import gradient
from dpo_score.losses.formulas import f_score
from dpo_score.losses.parse import LOSSES, LossInputs, ResolvedLoss, evaluate, parse_loss
from tests.losses.trl_oracle import random_batch

LN2 = 0.6931471805599453
EXTRA: dict[str, dict[str, Any]] = {"odpo": {"offset_column": "offset"}}
ALL = sorted(LOSSES)


def resolved(name: str, beta: float | None = None, epsilon: float | None = None, **params: Any) -> ResolvedLoss:
    return parse_loss(LossSpec(name=name, beta=beta, label_smoothing=epsilon, params=EXTRA.get(name, {}) | params))


def one(pc: float, pr: float, rc: float, rr: float, nc: float = 4, nr: float = 2, offset: float = 0.5) -> LossInputs:
    values = [np.array([float(v)]) for v in (pc, pr, rc, rr, nc, nr)]
    return LossInputs(*values, *values[:4], *values[:2], np.array([offset]))


def value(name: str, x: LossInputs, beta: float | None = None, epsilon: float | None = None, **params: Any) -> float:
    return float(evaluate(resolved(name, beta, epsilon, **params), x)[0])


def sigma(z: float) -> float:
    return 1 / (1 + math.exp(-z))


# Δc = 2, Δr = −1, δ = 3, πc/nc = −2, πr/nr = −5; every expectation is written out from the paper's formula.
PAIR = one(-8, -10, -10, -9)
BY_HAND = [
    ("sigmoid", {"beta": 0.1}, math.log1p(math.exp(-0.3))),
    ("sigmoid", {"beta": 0.1, "epsilon": 0.1}, 0.9 * math.log1p(math.exp(-0.3)) + 0.1 * math.log1p(math.exp(0.3))),
    ("cdpo", {"beta": 0.1, "epsilon": 0.1}, 0.9 * math.log1p(math.exp(-0.3)) + 0.1 * math.log1p(math.exp(0.3))),
    (
        "robust",
        {"beta": 0.1, "epsilon": 0.1},
        (0.9 * math.log1p(math.exp(-0.3)) - 0.1 * math.log1p(math.exp(0.3))) / 0.8,
    ),
    ("hinge", {"beta": 0.1}, 0.7),
    ("hinge", {"beta": 1.0}, 0.0),
    ("ipo", {"beta": 0.1}, (2 / 4 + 1 / 2 - 5) ** 2),
    ("ipo_sum", {"beta": 0.1}, (3 - 5) ** 2),
    (
        "exo_pair",
        {"beta": 0.1, "epsilon": 0.01},
        sigma(0.3) * (math.log(sigma(0.3)) - math.log(0.99)) + sigma(-0.3) * (math.log(sigma(-0.3)) - math.log(0.01)),
    ),
    (
        "nca_pair",
        {"beta": 0.1},
        -math.log(sigma(0.2)) - 0.5 * math.log(sigma(-0.2)) - 0.5 * math.log(sigma(0.1)),
    ),
    ("bco_pair", {"beta": 0.1}, -math.log(sigma(0.2)) - math.log(sigma(0.1))),
    ("sppo_hard", {"beta": 0.1}, (2 - 5) ** 2 + (-1 + 5) ** 2),
    ("apo_zero", {"beta": 0.1}, 1 - sigma(0.2) + sigma(-0.1)),
    ("apo_down", {"beta": 0.1}, sigma(0.2) + 1 - sigma(0.3)),
    ("discopop", {"beta": 0.1}, -math.log(sigma(0.3)) * (1 - sigma(6.0)) + math.exp(-0.3) * sigma(6.0)),
    ("sigmoid_norm", {"beta": 0.1}, -math.log(sigma(0.1 * (2 / 4 + 1 / 2)))),
    ("sft", {}, 2.0),
    ("simpo", {"beta": 2.0}, -math.log(sigma(2 * 3 - 0.5))),
    ("simpo", {"beta": 2.0, "epsilon": 0.1}, -0.9 * math.log(sigma(5.5)) - 0.1 * math.log(sigma(-5.5))),
    ("simpo_hinge", {"beta": 0.1}, 1 - (0.3 - 0.025)),
    (
        "orpo",
        {"beta": 0.1},
        2 - 0.1 * math.log(sigma(3 - (math.log(1 - math.exp(-2)) - math.log(1 - math.exp(-5))))),
    ),
    ("cpo", {"beta": 0.1}, -math.log(sigma(0.2)) + 2),
    ("slic", {"beta": 1.0}, 0 + 0.1 * 8),
    ("slic", {"beta": 3.0}, 1 + 0.1 * 8),
    ("kto_pair", {"beta": 0.1, "kl": 0.5}, 0.5 * (1 - sigma(0.15)) + 0.5 * (1 - sigma(0.15))),
    ("r_dpo", {"beta": 0.1}, -math.log(sigma(0.3 + 0.01 * 2))),
    ("dpop", {"beta": 0.1}, -math.log(sigma(0.3))),
    ("odpo", {"beta": 0.1}, -math.log(sigma(0.3 - 0.5))),
    ("aot", {"beta": 0.1}, -math.log(sigma(0.3))),
    ("aot_unpaired", {"beta": 0.1}, -math.log(sigma(0.3))),
]


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND)
def test_known_answers(name: str, options: dict[str, Any], expected: float) -> None:
    assert value(name, PAIR, **options) == pytest.approx(expected, rel=1e-12)


def test_every_loss_has_a_known_answer() -> None:
    assert {name for name, _, _ in BY_HAND} == set(LOSSES)


def test_dpop_punishes_a_chosen_answer_that_fell() -> None:
    fell = one(-12, -14, -10, -9)  # Δc = −2, Δr = −5
    assert value("dpop", fell, 0.1) == pytest.approx(-math.log(sigma(0.1 * (3 - 50 * 2))), rel=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "cdpo", "robust", "odpo"])
def test_policy_equal_to_reference_has_loss_ln_2_exactly(name: str) -> None:
    assert value(name, one(-7.3, -9.1, -7.3, -9.1, offset=0.0)) == LN2


def test_f_scores_by_hand() -> None:
    delta = np.array([0.7])
    assert f_score(delta, "forward_kl", 0.5)[0] == pytest.approx(1 - math.exp(-0.7))
    assert f_score(delta, "js_divergence", 0.5)[0] == pytest.approx(math.log(2 * math.exp(0.7) / (1 + math.exp(0.7))))
    assert f_score(delta, "alpha_divergence", 0.5)[0] == pytest.approx((math.exp(-0.35) - 1) / -0.5)
    assert f_score(np.array([0.0]), "alpha_divergence", 0.5)[0] == 0.0
    assert f_score(np.array([-1e6]), "alpha_divergence", 0.5)[0] == pytest.approx(-2 * (math.exp(80) - 1))


def tensors(x: LossInputs, **grad: bool) -> LossInputs:
    arrays = {name: getattr(x, name) for name in LossInputs.__dataclass_fields__}
    return LossInputs(
        **{
            name: None if v is None else torch.tensor(v, dtype=torch.float64, requires_grad=name in grad)
            for name, v in arrays.items()
        }
    )


def drawn(seed: int) -> LossInputs:
    batch = random_batch(seed, pairs=40)
    x = batch.inputs()
    arrays = {name: getattr(x, name) for name in LossInputs.__dataclass_fields__}
    return LossInputs(**arrays | {"offset": np.linspace(0, 2, 40)})


VARIANTS: list[dict[str, Any]] = [{}, {"ld_alpha": 0.4}, {"wpo": True}, {"reference_free": True}]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("params", VARIANTS, ids=str)
def test_numpy_and_torch_agree(name: str, params: dict[str, Any]) -> None:
    if params.get("wpo") and LOSSES[name].whole_set:
        return
    loss, x = resolved(name, **params), drawn(1)
    assert evaluate(loss, x) == pytest.approx(evaluate(loss, tensors(x)).numpy(), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("params", VARIANTS, ids=str)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_the_exact_derivative_is_torchs(name: str, params: dict[str, Any], side: str) -> None:
    if LOSSES[name].whole_set and (params.get("wpo") or side == "rejected"):
        return  # in a sorted loss the rejected answer of a row also moves the loss of another row
    loss, x = resolved(name, **params), drawn(2)
    assert gradient(loss, x, side) == pytest.approx(torch_gradient(loss, x, side), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", [name for name in ALL if LOSSES[name].f_divergence])
def test_the_exact_derivative_through_a_divergence_is_torchs(name: str, divergence: str) -> None:
    x = drawn(3)
    small = LossInputs(**{k: v if v is None or k.endswith("tokens") else v / 8 for k, v in fields(x).items()})
    loss = resolved(name, f_divergence=divergence)
    for side in ("chosen", "rejected"):
        assert gradient(loss, small, side) == pytest.approx(torch_gradient(loss, small, side), rel=1e-8, abs=1e-12)


def fields(x: LossInputs) -> dict[str, Any]:
    return {name: getattr(x, name) for name in LossInputs.__dataclass_fields__}


def torch_gradient(loss: ResolvedLoss, x: LossInputs, side: str) -> np.ndarray:
    """∂Σloss/∂π by autograd; under LD weighting the full and the shared sum move together."""
    t = tensors(x)
    step = torch.zeros(len(x.policy_chosen), dtype=torch.float64, requires_grad=True)
    moved = {name: getattr(t, name) + step for name in (f"policy_{side}", f"policy_{side}_shared")}
    total = evaluate(loss, LossInputs(**fields(t) | moved)).sum() + 0.0 * step.sum()  # sft never reads rejected
    (found,) = torch.autograd.grad(total, step)
    return found.numpy()


finite = st.floats(-300, 0, allow_subnormal=False)


@given(finite, finite, finite, finite, st.floats(0.01, 2))
@settings(max_examples=50, deadline=None)
def test_sigmoid_is_decreasing_in_the_margin(pc: float, pr: float, rc: float, rr: float, beta: float) -> None:
    lower, higher = value("sigmoid", one(pc, pr, rc, rr), beta), value("sigmoid", one(pc + 1, pr, rc, rr), beta)
    assert higher <= lower
    assert lower >= 0


@given(finite, finite, finite, finite, st.floats(0.01, 2))
@settings(max_examples=50, deadline=None)
def test_swapping_the_answers_swaps_the_sign_of_z(pc: float, pr: float, rc: float, rr: float, beta: float) -> None:
    """L(−z) = L(z) − z, so the swapped pair costs z more; at ε = ½ the loss does not know which answer won."""
    z = beta * ((pc - rc) - (pr - rr))
    straight, swapped = value("sigmoid", one(pc, pr, rc, rr), beta), value("sigmoid", one(pr, pc, rr, rc), beta)
    assert swapped - straight == pytest.approx(z, abs=1e-9)
    even = [value("cdpo", one(*x), beta, 0.5) for x in ((pc, pr, rc, rr), (pr, pc, rr, rc))]
    assert even[0] == pytest.approx(even[1], abs=1e-9)


@given(finite, finite, finite, finite)
@settings(max_examples=50, deadline=None)
def test_robust_is_unbiased_under_its_own_flip_rate(pc: float, pr: float, rc: float, rr: float) -> None:
    """0.9·loss(kept label) + 0.1·loss(flipped label) = the clean loss: what the correction is for."""
    kept, flipped = (value("robust", one(*x), 0.1, 0.1) for x in ((pc, pr, rc, rr), (pr, pc, rr, rc)))
    assert 0.9 * kept + 0.1 * flipped == pytest.approx(value("sigmoid", one(pc, pr, rc, rr), 0.1), abs=1e-9)


@given(finite, finite, finite, finite)
@settings(max_examples=50, deadline=None)
def test_a_shift_of_policy_and_reference_alike_changes_no_reference_loss(
    pc: float, pr: float, rc: float, rr: float
) -> None:
    for name in ("sigmoid", "hinge", "nca_pair", "apo_zero", "bco_pair"):
        moved = value(name, one(pc - 4, pr - 4, rc - 4, rr - 4), 0.1)
        assert moved == pytest.approx(value(name, one(pc, pr, rc, rr), 0.1), abs=1e-9)


def test_aot_does_not_depend_on_the_order_of_pairs() -> None:
    x = drawn(4)
    order = np.random.default_rng(0).permutation(40)
    shuffled = LossInputs(**{name: None if v is None else v[order] for name, v in fields(x).items()})
    for name in ("aot", "aot_unpaired"):
        assert np.array_equal(evaluate(resolved(name), x)[order], evaluate(resolved(name), shuffled))
