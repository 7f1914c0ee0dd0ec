"""`DPOLoss` and `sequence_logps`: the shapes, semantics and gradients that training code relies on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_score.errors import ConfigError, UsageError
from dpo_score.losses.torch import DPOLoss, sequence_logps

LN2 = 0.6931471805599453


def four(*rows: tuple[float, float, float, float]) -> list[torch.Tensor]:
    return list(torch.tensor(rows, dtype=torch.float64).T)


def test_losses_and_rewards_of_a_batch() -> None:
    losses, chosen, rejected = DPOLoss(beta=0.5)(*four((-8, -10, -10, -9), (-1, -1, -1, -1)))
    assert losses.tolist() == [pytest.approx(math.log1p(math.exp(-1.5))), LN2]
    assert chosen.tolist() == [1.0, 0.0]
    assert rejected.tolist() == [-0.5, 0.0]


def test_defaults_are_torchtunes() -> None:
    assert (DPOLoss().beta, DPOLoss().label_smoothing) == (0.1, 0.0)


@given(st.lists(st.tuples(*[st.floats(-200, 0)] * 4), min_size=1, max_size=5), st.floats(0, 0.5), st.floats(0.01, 2))
@settings(max_examples=30, deadline=None)
def test_it_is_the_documented_expression(
    rows: list[tuple[float, float, float, float]], epsilon: float, beta: float
) -> None:
    pc, pr, rc, rr = four(*rows)
    logits = (pc - pr) - (rc - rr)
    log_sigmoid = torch.nn.functional.logsigmoid
    expected = -(1 - epsilon) * log_sigmoid(beta * logits) - epsilon * log_sigmoid(-beta * logits)
    losses, _, _ = DPOLoss(beta, epsilon)(pc, pr, rc, rr)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)


def test_gradients_reach_the_policy_alone_and_rewards_are_detached() -> None:
    inputs = [x.requires_grad_() for x in four((-8, -10, -10, -9), (-3, -2, -3, -4))]
    losses, chosen, rejected = DPOLoss(beta=0.1)(*inputs)
    losses.mean().backward()
    z = 0.1 * ((inputs[0] - inputs[2]) - (inputs[1] - inputs[3])).detach()
    torch.testing.assert_close(inputs[0].grad, -0.1 * torch.sigmoid(-z) / 2)
    torch.testing.assert_close(inputs[1].grad, 0.1 * torch.sigmoid(-z) / 2)
    assert not chosen.requires_grad
    assert not rejected.requires_grad


def test_gradients_agree_with_finite_differences() -> None:
    inputs = [x.requires_grad_() for x in four((-8, -10, -10, -9), (-3, -2, -3, -4))]
    assert torch.autograd.gradcheck(lambda *x: DPOLoss(0.7, 0.2)(*x)[0], inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_inputs_is_kept(dtype: torch.dtype) -> None:
    losses, _, _ = DPOLoss()(*(x.to(dtype) for x in four((-8, -10, -10, -9))))
    assert losses.dtype == dtype


def test_wrong_shapes_and_parameters_are_refused() -> None:
    pc, pr, rc, rr = four((-1, -2, -1, -2), (-1, -2, -1, -2))
    with pytest.raises(UsageError, match="one shape"):
        DPOLoss()(pc, pr, rc, rr[:1])
    with pytest.raises(ConfigError):
        DPOLoss(beta=-1)
    with pytest.raises(ConfigError):
        DPOLoss(label_smoothing=0.7)


def naive(logits: torch.Tensor, labels: torch.Tensor, shift: int) -> list[float]:
    """One token at a time, in float64."""
    sums = []
    for row, label in zip(logits.double(), labels, strict=True):
        picked = [(t, int(v)) for t, v in enumerate(label) if t >= shift and v != -100]
        sums.append(sum(float(row[t - shift].log_softmax(-1)[v]) for t, v in picked))
    return sums


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 11, (3, 6), generator=generator)
    labels[0, :2], labels[1, 4:], labels[2] = -100, -100, -100
    labels[2, 3] = 5
    return logits, labels


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_sums_equal_a_token_by_token_twin(encoder_decoder: bool) -> None:
    logits, labels = batch()
    found = sequence_logps(logits, labels, is_encoder_decoder=encoder_decoder)
    assert found.shape == (3,)
    assert found.tolist() == pytest.approx(naive(logits, labels, 0 if encoder_decoder else 1), rel=1e-12)


def test_the_average_is_over_scored_labels() -> None:
    logits, labels = batch()
    counts = (labels[:, 1:] != -100).sum(-1)
    average = sequence_logps(logits, labels, average_log_prob=True)
    torch.testing.assert_close(average, sequence_logps(logits, labels) / counts)


def test_another_pad_label() -> None:
    logits, labels = batch()
    padded = labels.masked_fill(labels == -100, -7)
    assert torch.equal(sequence_logps(logits, padded, label_pad_token_id=-7), sequence_logps(logits, labels))


def test_the_arguments_are_left_alone() -> None:
    logits, labels = batch()
    before = logits.clone(), labels.clone()
    sequence_logps(logits, labels)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


def test_a_row_without_labels_sums_to_0_and_averages_to_nan() -> None:
    logits, labels = batch()
    labels[0] = -100
    assert sequence_logps(logits, labels)[0] == 0.0
    assert sequence_logps(logits, labels, average_log_prob=True)[0].isnan()


def test_16_bit_logits_are_reduced_in_float32() -> None:
    logits, labels = batch(torch.bfloat16)
    found = sequence_logps(logits, labels)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(naive(logits, labels, 1), rel=1e-6)


def test_it_is_differentiable() -> None:
    logits, labels = batch()
    assert torch.autograd.gradcheck(lambda x: sequence_logps(x, labels), logits.requires_grad_())


def test_masked_infinite_logits_do_not_leak() -> None:
    logits, labels = batch()
    logits[0, 0] = float("-inf")  # position 0 predicts label 1, which is masked
    assert torch.isfinite(sequence_logps(logits, labels)).all()


def test_shapes_that_do_not_fit_are_named() -> None:
    logits, labels = batch()
    with pytest.raises(UsageError, match=r"\(3, 6\), got \(3, 5\)"):
        sequence_logps(logits, labels[:, 1:])


def test_sums_are_those_of_trls_own_function() -> None:
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    logits, labels = batch()
    for average in (False, True):
        expected = cpo.CPOTrainer.get_batch_logps(logits, labels.clone(), average_log_prob=average)
        torch.testing.assert_close(sequence_logps(logits, labels, average_log_prob=average), expected)
