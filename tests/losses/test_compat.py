"""The names of exercises and older trainers, each against the formula, example and errors of its own document."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_score import DPOLoss, dpo_gradients, dpo_loss, get_batch_logps, sequence_logps

SUMS = [[-10.0, -20.5, -3.0], [-12.0, -19.0, -3.5], [-11.0, -20.0, -3.0], [-11.5, -20.0, -3.0]]


def by_the_document(sums: list[list[float]], beta: float) -> tuple[list[float], list[float], list[float]]:
    """Losses and rewards of each pair, written out."""
    rows = list(zip(*sums, strict=True))
    chosen = [beta * (pc - rc) for pc, _, rc, _ in rows]
    rejected = [beta * (pr - rr) for _, pr, _, rr in rows]
    losses = [math.log1p(math.exp(-(c - r))) for c, r in zip(chosen, rejected, strict=True)]
    return losses, chosen, rejected


def test_lists_give_the_dictionary_of_the_practice_problem_with_four_decimals() -> None:
    found = dpo_loss([-2.0, -1.5], [-3.0, -2.5], [-2.5, -2.0], [-2.5, -2.0], beta=0.5)
    assert found == {"loss": 0.4741, "chosen_rewards": [0.25, 0.25], "rejected_rewards": [-0.25, -0.25]}
    losses, chosen, rejected = by_the_document(SUMS, 0.3)
    assert dpo_loss(*SUMS, 0.3) == {
        "loss": round(sum(losses) / 3, 4),
        "chosen_rewards": [round(value, 4) for value in chosen],
        "rejected_rewards": [round(value, 4) for value in rejected],
    }


def test_arrays_give_the_mean_loss_as_a_float() -> None:
    found = dpo_loss(*(np.array([value]) for value in (-1.0, -2.0, -1.5, -2.5)), beta=0.1)
    assert isinstance(found, float)
    assert found == pytest.approx(math.log(2.0))
    losses, _, _ = by_the_document(SUMS, 0.1)
    assert dpo_loss(*map(np.array, SUMS)) == pytest.approx(sum(losses) / 3)


@given(st.lists(st.tuples(*[st.floats(-300, 0)] * 4), min_size=1, max_size=6), st.floats(0.01, 2))
def test_the_loss_is_positive_and_falls_as_the_margin_grows(rows: list[tuple[float, ...]], beta: float) -> None:
    sums = [np.array(column) for column in zip(*rows, strict=True)]
    loss = dpo_loss(*sums, beta=beta)
    assert loss >= 0.0
    assert dpo_loss(sums[0] + 1.0, *sums[1:], beta=beta) <= loss


def test_tensors_give_what_trl_gives_and_stay_differentiable() -> None:
    sums = [torch.tensor(values, dtype=torch.float64, requires_grad=i < 2) for i, values in enumerate(SUMS)]
    losses, chosen, rejected = dpo_loss(*sums, beta=0.1)
    expected = by_the_document(SUMS, 0.1)
    for found, wanted in zip((losses, chosen, rejected), expected, strict=True):
        assert found.tolist() == pytest.approx(wanted)
    assert not chosen.requires_grad
    losses.mean().backward()
    gradients = dpo_gradients(*SUMS, beta=0.1)
    assert sums[0].grad.tolist() == pytest.approx(gradients["grad_chosen"])
    assert sums[1].grad.tolist() == pytest.approx(gradients["grad_rejected"])
    smoothed = dpo_loss(*sums, 0.1, 0.2)[0]
    assert torch.equal(smoothed, DPOLoss(0.1, 0.2)(*sums)[0])


def test_gradients_are_those_of_the_mean_loss_and_the_margin_has_no_beta() -> None:
    found, step = dpo_gradients(*map(np.array, SUMS), beta=0.4), 1e-6
    assert found["mean_reward_margin"] == pytest.approx(
        np.mean([pc - pr - rc + rr for pc, pr, rc, rr in zip(*SUMS, strict=True)])
    )
    for side, key in ((0, "grad_chosen"), (1, "grad_rejected")):
        assert isinstance(found[key], np.ndarray)
        for pair in range(3):
            moved = [np.array(values) for values in SUMS]
            moved[side][pair] += step
            slope = (dpo_loss(*moved, beta=0.4) - found["loss"]) / step
            assert found[key][pair] == pytest.approx(slope, rel=1e-4)
    assert isinstance(dpo_gradients(*SUMS)["grad_chosen"], list)


@pytest.mark.parametrize(
    "names",
    [
        ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"),
        ("log_probs_chosen_policy", "log_probs_rejected_policy", "log_probs_chosen_ref", "log_probs_rejected_ref"),
        ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"),
    ],
)
def test_arguments_may_have_the_names_of_each_document(names: tuple[str, ...]) -> None:
    named = dict(zip(names, SUMS, strict=True))
    assert dpo_loss(**named, beta=0.1) == dpo_loss(*SUMS)
    assert dpo_gradients(**named) == dpo_gradients(*SUMS)
    with pytest.raises(TypeError, match="no argument 'ref'"):
        dpo_loss(*SUMS[:3], ref=SUMS[3])
    with pytest.raises(ValueError, match="one argument"):
        dpo_loss(*SUMS, ref_rejected=SUMS[3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dpo_loss([], [], [], []), "no pairs"),
        (lambda: dpo_loss([-1.0], [-1.0, -2.0], [-1.0], [-1.0]), "one length"),
        (lambda: dpo_loss([-1.0], [math.nan], [-1.0], [-1.0]), "finite"),
        (lambda: dpo_loss(*SUMS, beta=0.0), "beta"),
        (lambda: dpo_loss(*SUMS, 0.1, 0.7), "label_smoothing"),
        (lambda: dpo_loss(*SUMS[:3]), "None"),
        (lambda: dpo_gradients(*SUMS, beta=-1.0), "beta"),
        (lambda: dpo_loss(*(torch.zeros(n) for n in (2, 2, 2, 3))), "one shape"),
        (lambda: get_batch_logps(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long)), r"\(2, 3\), got \(2, 4\)"),
    ],
)
def test_a_wrong_value_is_a_value_error(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_get_batch_logps_is_the_function_of_that_name() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[-100, 1, 2, 3, -100], [-100, -100, 4, 5, 6]])
    for average in (False, True):
        expected = []
        for row in range(2):
            found = [
                float(logits[row, t - 1].log_softmax(-1)[labels[row, t]]) for t in range(1, 5) if labels[row, t] != -100
            ]
            expected.append(sum(found) / (len(found) if average else 1))
        assert get_batch_logps(logits, labels, average).tolist() == pytest.approx(expected)
    assert torch.equal(get_batch_logps(logits, labels), sequence_logps(logits, labels))
    assert labels[0, 0] == -100


def test_lists_and_arrays_import_no_torch() -> None:
    program = (
        "import sys, dpo_score; dpo_score.dpo_loss([-1.0], [-2.0], [-1.0], [-2.0]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
