"""The names that exercises and older trainers use: `dpo_loss`, `dpo_gradients`, `get_batch_logps`.

Each returns what the document that a caller comes from promises for the kind of argument that it passes:

    torch tensors   (losses, chosen_rewards, rejected_rewards), as TRL's and the DPO authors' `dpo_loss` return
    NumPy arrays    the mean loss, a float, as the practice problem "DPO loss" does
    lists           {"loss", "chosen_rewards", "rejected_rewards"}, rounded to four decimals, as Onlearn's problem does

torch is imported only when a tensor is passed. A wrong value is a DataError or ConfigError, which are ValueErrors too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_score.errors import ConfigError
from dpo_score.losses.evaluate import evaluate_pairs
from dpo_score.losses.ops import is_tensor

if TYPE_CHECKING:
    from torch import Tensor

DECIMALS = 4
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "policy_chosen_logps": ("policy_chosen", "log_probs_chosen_policy", "pi_chosen"),
    "policy_rejected_logps": ("policy_rejected", "log_probs_rejected_policy", "pi_rejected"),
    "reference_chosen_logps": ("ref_chosen", "ref_chosen_logps", "reference_chosen", "log_probs_chosen_ref"),
    "reference_rejected_logps": ("ref_rejected", "ref_rejected_logps", "reference_rejected", "log_probs_rejected_ref"),
}
"""Each argument in order, and the other names that documents give it."""


def dpo_loss(
    policy_chosen_logps: Any = None,
    policy_rejected_logps: Any = None,
    reference_chosen_logps: Any = None,
    reference_rejected_logps: Any = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    **other_names: Any,
) -> Any:
    """−log σ(β·[(πc − ρc) − (πr − ρr)]) of preference pairs. DPO, arXiv 2305.18290 eq. 7.

    Args:
        policy_chosen_logps, …: summed log-probabilities in nats, four of one length; also by the names in ARGUMENTS.
        beta: above 0.
        label_smoothing: ε of cDPO, from 0 to 0.5.

    Returns:
        Tensors (batch,): the losses, differentiable, and both rewards β·(π − ρ), detached. NumPy arrays: the mean loss.
        Lists: a dictionary of the mean loss and the lists of rewards, rounded to four decimals.

    >>> dpo_loss([-2.0, -1.5], [-3.0, -2.5], [-2.5, -2.0], [-2.5, -2.0], beta=0.5)
    {'loss': 0.4741, 'chosen_rewards': [0.25, 0.25], 'rejected_rewards': [-0.25, -0.25]}
    """
    given = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    sums = _by_name(given, other_names)
    if all(is_tensor(values) for values in sums):
        from dpo_score.losses.torch import DPOLoss

        return DPOLoss(beta, label_smoothing)(*sums)
    found = evaluate_pairs(*sums, beta=beta, label_smoothing=label_smoothing)
    if any(isinstance(values, np.ndarray) for values in sums):
        return found["loss"]
    rewards = {side: np.round(found[side], DECIMALS).tolist() for side in ("chosen_rewards", "rejected_rewards")}
    return {"loss": round(found["loss"], DECIMALS), **rewards}


def dpo_gradients(
    policy_chosen_logps: Any = None,
    policy_rejected_logps: Any = None,
    reference_chosen_logps: Any = None,
    reference_rejected_logps: Any = None,
    beta: float = 0.1,
    **other_names: Any,
) -> dict[str, Any]:
    """The mean DPO loss and its derivatives by the policy's log-probabilities: ∓β·σ(−βδ)/n for each of n pairs.

    Returns:
        `loss` (float), `grad_chosen`, `grad_rejected` (lists, or arrays where an array was passed) and
        `mean_reward_margin`, the mean of δ = (πc − ρc) − (πr − ρr), without β.

    >>> found = dpo_gradients([-1.0], [-2.0], [-1.5], [-2.5], beta=0.1)
    >>> found["grad_chosen"], found["grad_rejected"], found["mean_reward_margin"]
    ([-0.05], [0.05], 0.0)
    """
    given = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    sums = _by_name(given, other_names)
    found = evaluate_pairs(*sums, beta=beta)
    as_given = np.array if any(isinstance(values, np.ndarray) for values in sums) else list
    return {
        "loss": found["loss"],
        "grad_chosen": as_given(found["grad_chosen"]),
        "grad_rejected": as_given(found["grad_rejected"]),
        "mean_reward_margin": found["mean_logratio_margin"],
    }


def get_batch_logps(
    logits: Tensor,
    labels: Tensor,
    average_log_prob: bool = False,
    label_pad_token_id: int = -100,
    is_encoder_decoder: bool = False,
) -> Tensor:
    """`sequence_logps` by the name that TRL and the DPO authors gave it, with their arguments in their order.

    Returns the summed, or averaged, log-probability of each row's labels, shape (batch,). DataError, a ValueError,
    where the shapes of `logits` (batch, length, vocabulary) and `labels` (batch, length) do not fit.

    >>> import torch
    >>> round(get_batch_logps(torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]])).item(), 4)
    -2.7726
    """
    from dpo_score.losses.torch import sequence_logps

    return sequence_logps(logits, labels, average_log_prob, label_pad_token_id, is_encoder_decoder)


def _by_name(given: tuple[Any, ...], other_names: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """The four arguments in order, whichever names they were passed by."""
    found = dict(zip(ARGUMENTS, given, strict=True))
    for other, value in other_names.items():
        name = next((name for name, others in ARGUMENTS.items() if other in others), None)
        if name is None:
            raise TypeError(f"dpo_loss has no argument {other!r}; it has {', '.join(ARGUMENTS)}, beta")
        if found[name] is not None:
            raise ConfigError(f"{name} and {other} are one argument: pass it once")
        found[name] = value
    chosen, rejected, ref_chosen, ref_rejected = found.values()
    return chosen, rejected, ref_chosen, ref_rejected
