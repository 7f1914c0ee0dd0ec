"""`evaluate_pairs`: from log-probabilities to a dictionary of numbers, for notebooks and exercises.

Takes lists, NumPy arrays, torch tensors or polars Series of one length. Computes in float64 NumPy and does not import
torch. Not differentiable: use `DPOLoss` for training.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dpo_score.config.schema import LossSpec
from dpo_score.errors import DataError, UsageError
from dpo_score.losses.columns import gradient
from dpo_score.losses.ops import Floats, is_tensor
from dpo_score.losses.parse import LossInputs, ResolvedLoss, evaluate, parse_loss


def evaluate_pairs(
    policy_chosen: Any,
    policy_rejected: Any,
    reference_chosen: Any,
    reference_rejected: Any,
    beta: float | None = 0.1,
    *,
    loss: str = "sigmoid",
    label_smoothing: float | None = None,
    params: dict[str, float | int | bool | str] | None = None,
    chosen_tokens: Any = None,
    rejected_tokens: Any = None,
) -> dict[str, Any]:
    """Loss, rewards, margins and gradients of preference pairs from summed log-probabilities (nats).

    Returns `loss` (mean), the per-pair lists `losses`, `chosen_rewards`, `rejected_rewards` (β·Δ), `margins`,
    `grad_chosen`, `grad_rejected` (∂ of the mean loss by each policy log-probability) and `mean_logratio_margin` =
    mean(Δc − Δr), without β. `chosen_tokens`, `rejected_tokens`: scored tokens, for losses that read lengths.
    DataError: empty, unequal lengths, a value that is not finite. ConfigError: unknown loss, parameter out of range.

    >>> found = evaluate_pairs([-2.0], [-3.0], [-2.5], [-2.5], beta=0.5)
    >>> found["margins"], round(found["loss"], 4)
    ([0.5], 0.4741)
    """
    resolved = parse_loss(LossSpec(name=loss, beta=beta, label_smoothing=label_smoothing, params=params or {}))
    arrays = _aligned(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=reference_chosen,
        ref_rejected=reference_rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
    )
    _check_computable(resolved, arrays)
    return _numbers(resolved, LossInputs(**arrays))


def _numbers(loss: ResolvedLoss, x: LossInputs) -> dict[str, Any]:
    n = len(x.policy_chosen)
    delta_chosen, delta_rejected = x.policy_chosen - x.ref_chosen, x.policy_rejected - x.ref_rejected
    with np.errstate(all="ignore"):
        losses = evaluate(loss, x)
    if not np.isfinite(losses).all():
        row = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise DataError(f"the {loss.name} loss of pair {row} leaves the floating-point range: use another loss or beta")
    return {
        "loss": float(np.mean(losses)),
        "losses": losses.tolist(),
        "chosen_rewards": (loss.beta * delta_chosen).tolist(),
        "rejected_rewards": (loss.beta * delta_rejected).tolist(),
        "margins": (loss.beta * delta_chosen - loss.beta * delta_rejected).tolist(),
        "grad_chosen": (gradient(loss, x, "chosen") / n).tolist(),
        "grad_rejected": (gradient(loss, x, "rejected") / n).tolist(),
        "mean_logratio_margin": float(np.mean(delta_chosen - delta_rejected)),
    }


def _aligned(**given: Any) -> dict[str, Floats]:
    """The arguments that were given, as float64 arrays of one length without a hole."""
    absent = [name for name, values in given.items() if values is None and not name.endswith("tokens")]
    if absent:
        raise DataError(f"{absent[0]} is None: all four log-probabilities are needed")
    arrays = {name: _array(name, values) for name, values in given.items() if values is not None}
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"all inputs need one length, got {', '.join(f'{k}: {v}' for k, v in lengths.items())}")
    if 0 in lengths.values():
        raise DataError("no pairs: every input is empty")
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(f"{name}[{row}] is {values[row]}: every log-probability must be a finite number")
    return arrays


def _array(name: str, values: Any) -> Floats:
    if is_tensor(values):
        values = values.detach().cpu().double().numpy()
    elif hasattr(values, "to_numpy"):
        values = values.to_numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} holds something that is not a number: {error}") from error
    if array.ndim != 1:
        raise DataError(f"{name} has shape {array.shape}: one number for each pair is needed, shape (pairs,)")
    return array


def _check_computable(loss: ResolvedLoss, arrays: dict[str, Floats]) -> None:
    if loss.whole_set or loss.custom is not None or loss.modifiers.wpo or loss.modifiers.ld_alpha is not None:
        raise UsageError(f"evaluate_pairs cannot compute {loss.name!r} with these parameters: score tables can")
    if loss.modifiers.offset_column is not None:
        raise UsageError("evaluate_pairs takes no offset column: subtract the offset from a margin, or use a table")
    if any(term.loss.lengths for term in loss.terms) and not {"chosen_tokens", "rejected_tokens"} <= arrays.keys():
        raise UsageError(f"the {loss.name} loss reads lengths: give chosen_tokens and rejected_tokens")
