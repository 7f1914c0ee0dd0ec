"""From stored log-probabilities to rewards, margins and loss: the derived columns of a score table.

A pure function of the stored values, elementwise in float64: the same values give the same bits in any block, so
`rescore` and `verify` reproduce them on one machine. (Another processor's exp and log may differ in the last bit.) An
unknown value is null. A loss that leaves the floating-point range is null, with `loss_code` "overflow". Gradients come
from the formulas by exact forward differentiation (`ops.Dual`), not by finite differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_score.errors import ConfigError
from dpo_score.losses.custom import evaluate_custom
from dpo_score.losses.ops import Dual, Floats
from dpo_score.losses.parse import LossInputs, ResolvedLoss, evaluate, formula_inputs

LARGEST_VALUE = 1e150
"""Rewards and losses beyond are null: their squares, which deviations and intervals need, are no numbers any more."""
DERIVED = (
    "chosen_rewards",
    "rejected_rewards",
    "margins",
    "margins_nats",
    "accuracy",
    "dpo_weight",
    "loss",
    "loss_code",
)
COLUMN_OF_INPUT = {
    "policy_chosen": "policy_chosen_logps",
    "policy_rejected": "policy_rejected_logps",
    "ref_chosen": "ref_chosen_logps",
    "ref_rejected": "ref_rejected_logps",
    "chosen_tokens": "chosen_tokens",
    "rejected_tokens": "rejected_tokens",
    "policy_chosen_shared": "policy_chosen_logps_shared",
    "policy_rejected_shared": "policy_rejected_logps_shared",
    "ref_chosen_shared": "ref_chosen_logps_shared",
    "ref_rejected_shared": "ref_rejected_logps_shared",
    "policy_chosen_log_sum_sq_probs": "policy_chosen_log_sum_sq_probs",
    "policy_rejected_log_sum_sq_probs": "policy_rejected_log_sum_sq_probs",
}


def needed_columns(loss: ResolvedLoss) -> dict[str, str]:
    """Input name → column, for every column without which `loss` cannot be computed."""
    terms = [term.loss for term in loss.terms]
    m = loss.modifiers
    names = ["policy_chosen", "policy_rejected"]
    names += [] if loss.reference_free or loss.custom else ["ref_chosen", "ref_rejected"]
    names += ["chosen_tokens", "rejected_tokens"] if m.wpo or any(t.lengths for t in terms) else []
    names += ["policy_chosen_log_sum_sq_probs", "policy_rejected_log_sum_sq_probs"] if m.wpo else []
    if m.ld_alpha is not None:
        names += [f"{name}_shared" for name in names if name.endswith(("_chosen", "_rejected"))]
    columns = {name: COLUMN_OF_INPUT[name] for name in names}
    if m.offset_column is not None:
        columns["offset"] = m.offset_column
    return columns


def check_columns(available: set[str], loss: ResolvedLoss) -> None:
    """ConfigError naming the first missing column and what would have stored it."""
    for name, column in needed_columns(loss).items():
        if column in available:
            continue
        flag = {"offset": f"--keep-columns {column}"}.get(name)
        flag = flag or ("--stats wpo" if name.endswith("probs") else None)
        flag = flag or ("--reference MODEL" if name.startswith("ref_") else None)
        way_out = f"run again with {flag}" if flag else "score the pairs again with this version"
        raise ConfigError(f"loss {loss.name!r} needs the column {column!r}, which these scores do not have: {way_out}")


def derive(
    columns: Mapping[str, Floats], loss: ResolvedLoss, *, has_reference: bool | None = None, whole_set: bool = False
) -> dict[str, NDArray[Any]]:
    """The derived columns as float64 arrays with NaN for null; `loss_code` is an object array of None or a code.

    `columns`: stored columns, float64, NaN for null, one length. `has_reference` None asks the columns.
    `whole_set`: the columns are all pairs, as losses over the whole set require (ConfigError otherwise).
    """
    check_columns(set(columns), loss)
    if loss.whole_set and not whole_set:
        raise ConfigError(f"loss {loss.name!r} sorts all pairs of a data set: compute it with `dpo-score rescore`")
    stored = np.isfinite(columns.get("ref_chosen_logps", np.empty(0)))
    has_reference = bool(stored.any()) if has_reference is None else has_reference and stored.size > 0
    inputs = _inputs(columns, loss)
    with np.errstate(all="ignore"):  # out-of-range results are looked for below, row by row
        rewards = _rewards(inputs, loss, has_reference)
        complete = _complete(columns, loss)
        values, weights = _loss_and_weight(columns, inputs, loss, complete)
    overflow = complete & ~(np.abs(values) <= LARGEST_VALUE)
    rewards = {name: np.where(np.abs(found) <= LARGEST_VALUE, found, np.nan) for name, found in rewards.items()}
    code = np.full(len(values), None, dtype=object)
    code[overflow] = "overflow"
    weights = np.where(np.isfinite(weights) & ~overflow, weights, np.nan)
    return rewards | {"dpo_weight": weights, "loss": np.where(overflow, np.nan, values), "loss_code": code}


def _inputs(columns: Mapping[str, Floats], loss: ResolvedLoss) -> LossInputs:
    known = {name: columns[column] for name, column in COLUMN_OF_INPUT.items() if column in columns}
    for name in ("chosen_tokens", "rejected_tokens"):
        if name in known:
            known[name] = np.where(known[name] > 0, known[name], np.nan)
    offset = loss.modifiers.offset_column
    return LossInputs(**known, offset=None if offset is None else columns[offset])


def _complete(columns: Mapping[str, Floats], loss: ResolvedLoss) -> NDArray[np.bool_]:
    """Rows in which every value that the loss reads is there."""
    read = [columns[column] for column in needed_columns(loss).values()]
    complete = np.logical_and.reduce([np.isfinite(values) for values in read])
    for name in ("chosen_tokens", "rejected_tokens"):
        if name in needed_columns(loss):
            complete &= columns[name] > 0
    return np.asarray(complete, dtype=np.bool_)


def _rewards(x: LossInputs, loss: ResolvedLoss, has_reference: bool) -> dict[str, Floats]:
    """β·Δ where there is a reference, whatever the loss; else what trainers without a reference log."""
    plain = replace(loss, modifiers=replace(loss.modifiers, reference_free=False))
    n = formula_inputs(plain, x if has_reference else replace(x, ref_chosen=None, ref_rejected=None))
    if has_reference:
        chosen, rejected = n.delta_chosen, n.delta_rejected
        nats = chosen - rejected
    else:
        mean = bool(loss.terms) and loss.terms[0].loss.reward_without_reference == "mean"
        chosen, rejected = n.means if mean else (n.chosen, n.rejected)
        nats = np.full_like(chosen, np.nan)
    chosen, rejected = loss.beta * chosen, loss.beta * rejected
    accuracy = np.where(chosen > rejected, 1.0, np.where(chosen < rejected, 0.0, np.nan))
    return {
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
        "margins": chosen - rejected,
        "margins_nats": nats,
        "accuracy": accuracy,
    }


def _loss_and_weight(
    columns: Mapping[str, Floats], x: LossInputs, loss: ResolvedLoss, complete: NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    """Loss per pair and −(∂loss/∂πc)/β, NaN where an input is missing."""
    rows = len(complete)
    if loss.custom is not None:
        return evaluate_custom(loss.custom, columns, loss.beta, rows), np.full(rows, np.nan)
    values, weights = np.full(rows, np.nan), np.full(rows, np.nan)
    there = _take(x, complete)  # a loss that ranks the set must not rank missing rows
    result = evaluate(loss, _seed(there, "chosen"))
    values[complete] = result.value
    weights[complete] = -result.slope / loss.beta
    return values, weights


def _take(x: LossInputs, rows: NDArray[np.bool_]) -> LossInputs:
    fields = {name: getattr(x, name) for name in LossInputs.__dataclass_fields__}
    return LossInputs(**{name: None if value is None else value[rows] for name, value in fields.items()})


def _seed(x: LossInputs, side: str) -> LossInputs:
    """Differentiate with respect to the log-probability of one side.

    Under LD weighting a change of any of the first min(nc, nr) tokens moves the full and the shared sum alike.
    """
    names = [name for name in (f"policy_{side}", f"policy_{side}_shared") if getattr(x, name) is not None]
    return replace(x, **{name: Dual.seed(getattr(x, name)) for name in names})


def gradient(loss: ResolvedLoss, x: LossInputs, side: str) -> Floats:
    """∂loss/∂π of one side ("chosen" or "rejected") for every pair, exact."""
    with np.errstate(all="ignore"):
        result = evaluate(loss, _seed(x, side))
    return result.slope if isinstance(result, Dual) else np.zeros_like(result)


def numeric_columns(table: pa.Table) -> dict[str, Floats]:
    """The numeric and boolean columns of a table as float64, NaN for null. Integers above 2⁵³ are rounded."""
    kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean)
    wanted = [field.name for field in table.schema if any(kind(field.type) for kind in kinds)]
    return {name: _float64(table.column(name)) for name in wanted}


def _float64(column: pa.ChunkedArray) -> Floats:
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    values: Floats = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values


def derive_table(
    table: pa.Table, loss: ResolvedLoss, *, has_reference: bool | None = None, whole_set: bool = False
) -> pa.Table:
    """`table` with the derived columns appended (replaced where they are already there). Rows keep their order."""
    columns = numeric_columns(table)
    derived = derive(columns, loss, has_reference=has_reference, whole_set=whole_set)
    tied = columns.get("tied")
    if tied is not None:  # a labelled tie has no right answer
        derived["accuracy"] = np.where(tied == 1.0, np.nan, derived["accuracy"])
    table = table.drop_columns([name for name in DERIVED if name in table.column_names])
    for name in DERIVED:
        table = table.append_column(_field(name, loss), as_arrow(derived[name]))
    return table


def _field(name: str, loss: ResolvedLoss) -> pa.Field:
    metadata = {"scope": "whole set"} if name == "loss" and loss.whole_set else None
    return pa.field(name, pa.string() if name == "loss_code" else pa.float64(), metadata=metadata)


def as_arrow(values: NDArray[Any]) -> pa.Array:
    """A derived column: null where a number is not finite."""
    if values.dtype == object:
        return pa.array(values, type=pa.string())
    return pa.array(values, type=pa.float64(), mask=~np.isfinite(values))
