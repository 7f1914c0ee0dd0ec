"""From what a user asked for (`LossSpec`) to a loss that can be computed (`ResolvedLoss`).

`sigmoid`, `0.8*sigmoid+0.2*bco_pair+1*sft` (a weighted sum) and `path.py:function` (custom.py) are the three forms.
Formulas live in formulas.py, their table in registry.py. Everything a number depends on is in `identity()`.
No torch: tensors are served when they are given.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from dpo_score.config.schema import LossSpec
from dpo_score.errors import ConfigError, nearest
from dpo_score.losses.custom import CustomLoss, is_custom, load_custom
from dpo_score.losses.formulas import Numbers, Settings, f_score
from dpo_score.losses.ops import Array, detached, exp
from dpo_score.losses.params import Modifiers, check_keys, checked_number, parse_modifiers
from dpo_score.losses.registry import LOSSES, Loss

__all__ = ["LOSSES", "Inputs", "Loss", "ResolvedLoss", "Term", "evaluate", "numbers", "parse_loss"]

_TERM = re.compile(r"(?:([0-9.eE+-]+)\*)?([A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Stored per-sequence numbers, shape (pairs,), nats: what a score table holds. None = not stored."""

    policy_chosen: Array
    policy_rejected: Array
    ref_chosen: Array = None
    ref_rejected: Array = None
    chosen_tokens: Array = None
    rejected_tokens: Array = None
    policy_chosen_shared: Array = None
    policy_rejected_shared: Array = None
    ref_chosen_shared: Array = None
    ref_rejected_shared: Array = None
    policy_chosen_log_sum_sq_probs: Array = None
    policy_rejected_log_sum_sq_probs: Array = None
    offset: Array = None


@dataclass(frozen=True, slots=True)
class Term:
    weight: float
    loss: Loss
    settings: Settings


@dataclass(frozen=True, slots=True)
class ResolvedLoss:
    """A loss with every parameter decided. `terms` is empty for a custom loss."""

    name: str
    beta: float
    label_smoothing: float | None
    terms: tuple[Term, ...]
    modifiers: Modifiers
    custom: CustomLoss | None = None

    @property
    def params(self) -> dict[str, Any]:
        """All parameters in force but β and ε, defaults included; those of several terms are prefixed."""
        prefix = len(self.terms) > 1
        own = {
            (f"{term.loss.name}.{key}" if prefix else key): value
            for term in self.terms
            for key, value in term.settings.params.items()
        }
        default = Modifiers()
        changed = {
            key: getattr(self.modifiers, key)
            for key in Modifiers.__dataclass_fields__
            if getattr(self.modifiers, key) != getattr(default, key)
        }
        if self.modifiers.f_divergence == "alpha_divergence":
            changed["f_alpha"] = self.modifiers.f_alpha
        return own | changed

    @property
    def reference_free(self) -> bool:
        """True when no reference value is read: no reference model is needed."""
        return self.modifiers.reference_free or (
            self.custom is None and not any(term.loss.reference for term in self.terms)
        )

    @property
    def whole_set(self) -> bool:
        return any(term.loss.whole_set for term in self.terms)

    def identity(self) -> dict[str, Any]:
        """Everything that decides the numbers, as JSON values."""
        terms = [
            {
                "weight": term.weight,
                "name": term.loss.name,
                "label_smoothing": term.settings.epsilon,
                "params": dict(term.settings.params),
            }
            for term in self.terms
        ]
        modifiers = {key: getattr(self.modifiers, key) for key in Modifiers.__dataclass_fields__}
        known: dict[str, Any] = {"name": self.name, "beta": self.beta, "terms": terms, "modifiers": modifiers}
        if self.custom is not None:
            known["custom"] = {"function": self.custom.function, "sha256": self.custom.sha256}
        if self.whole_set:
            known["scope"] = "whole set"
        return known


def parse_loss(spec: LossSpec, runs: bool = True) -> ResolvedLoss:
    """Resolve a loss: ConfigError on an unknown name or parameter, or a value outside its range.

    `runs`: whether the file of a custom loss is imported (see custom.py).
    """
    if is_custom(spec.name):
        return _custom(spec, runs)
    weighted = _parse_terms(spec.name)
    losses = [loss for _, loss in weighted]
    check_keys(spec.params, losses, spec.name)
    modifiers = parse_modifiers(spec.params)
    _check_modifiers(modifiers, losses, spec.name)
    beta = _resolve_beta(spec, losses)
    _check_smoothing_is_read(spec, losses)
    terms = tuple(Term(weight, loss, _settings(spec, loss, beta)) for weight, loss in weighted)
    label_smoothing = next((t.settings.epsilon for t in terms if t.loss.label_smoothing is not None), None)
    return ResolvedLoss(spec.name.replace(" ", ""), beta, label_smoothing, terms, modifiers)


def _custom(spec: LossSpec, runs: bool) -> ResolvedLoss:
    check_keys({k: v for k, v in spec.params.items() if k != "reference_free"}, [], spec.name)
    if spec.label_smoothing is not None:
        raise ConfigError(f"label_smoothing is not read by {spec.name!r}: a custom loss has its own parameters")
    beta = _checked_beta(0.1 if spec.beta is None else spec.beta)
    modifiers = parse_modifiers(spec.params)
    if modifiers.wpo or modifiers.ld_alpha is not None:
        raise ConfigError(f"wpo and ld_alpha are not laid over {spec.name!r}: a custom loss reads the columns itself")
    return ResolvedLoss(spec.name, beta, None, (), modifiers, load_custom(spec.name, runs))


def _parse_terms(name: str) -> list[tuple[float, Loss]]:
    return [_parse_term(part, name) for part in re.split(r"(?<![eE])\+", name.replace(" ", ""))]


def _parse_term(text: str, whole: str) -> tuple[float, Loss]:
    match = _TERM.fullmatch(text)
    if match is None:
        raise ConfigError(f"cannot read the loss {whole!r} at {text!r}: write NAME, or WEIGHT*NAME joined by +")
    if match[2] not in LOSSES:
        raise ConfigError(f"unknown loss {match[2]!r}: {nearest(match[2], LOSSES)}")
    try:
        weight = 1.0 if match[1] is None else float(match[1])
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ConfigError(f"the weight {match[1]!r} in the loss {whole!r} is not a finite number")
    return weight, LOSSES[match[2]]


def _checked_beta(beta: float) -> float:
    if not (math.isfinite(beta) and beta > 0.0):
        raise ConfigError(f"beta={beta!r}: must be a finite number above 0")
    return float(beta)


def _resolve_beta(spec: LossSpec, losses: list[Loss]) -> float:
    """The β asked for, or the losses' own. Terms with different defaults need one to be named."""
    if spec.beta is not None:
        return _checked_beta(spec.beta)
    defaults = sorted({loss.beta for loss in losses if loss.uses_beta} or {loss.beta for loss in losses})
    if len(defaults) > 1:
        raise ConfigError(f"the terms of {spec.name!r} have different default betas ({defaults}): name one with --beta")
    return defaults[0]


def _check_smoothing_is_read(spec: LossSpec, losses: list[Loss]) -> None:
    if spec.label_smoothing and all(loss.label_smoothing is None for loss in losses):
        readers = ", ".join(name for name, loss in LOSSES.items() if loss.label_smoothing is not None)
        raise ConfigError(f"loss {spec.name!r} has no label smoothing; the losses that have: {readers}")


def _settings(spec: LossSpec, loss: Loss, beta: float) -> Settings:
    params = {key: checked_number(key, spec.params.get(key, default)) for key, default in loss.params.items()}
    if loss.label_smoothing is None:
        return Settings(beta, 0.0, params)
    epsilon = loss.label_smoothing if spec.label_smoothing is None else float(spec.label_smoothing)
    _check_smoothing(epsilon, loss.name)
    return Settings(beta, epsilon, params)


def _check_smoothing(epsilon: float, name: str) -> None:
    if not 0.0 <= epsilon <= 0.5:
        raise ConfigError(f"label_smoothing={epsilon!r}: the share of wrong labels, between 0 and 0.5")
    if name == "robust" and epsilon == 0.5:
        raise ConfigError("label_smoothing=0.5 divides the robust loss by 0: use a value below 0.5")
    if name == "exo_pair" and epsilon == 0.0:
        raise ConfigError("label_smoothing=0 makes the exo_pair loss infinite: leave it out for its default 0.001")


def _check_modifiers(modifiers: Modifiers, losses: list[Loss], name: str) -> None:
    if any(loss.offset for loss in losses) and modifiers.offset_column is None:
        raise ConfigError(f"loss {name!r} needs --loss-param offset_column=COLUMN (kept with --keep-columns)")
    if modifiers.wpo and any(loss.whole_set for loss in losses):
        raise ConfigError(f"wpo weights pairs, and {name!r} breaks pairs up by sorting: they cannot be combined")
    if len(losses) > 1 and any(loss.whole_set for loss in losses):
        raise ConfigError(f"{name!r}: a loss over the whole set stands alone, not in a sum")


def numbers(loss: ResolvedLoss, x: Inputs) -> Numbers:
    """What the formulas read, after the LD weighting, the reference and the divergence of `loss`."""
    m = loss.modifiers
    chosen, rejected = (
        _ld(x.policy_chosen, x.policy_chosen_shared, m),
        _ld(x.policy_rejected, x.policy_rejected_shared, m),
    )
    common = {
        "chosen": chosen,
        "rejected": rejected,
        "nll": -x.policy_chosen,
        "chosen_tokens": x.chosen_tokens,
        "rejected_tokens": x.rejected_tokens,
        "offset": x.offset,
    }
    if x.ref_chosen is None and not m.reference_free:
        return Numbers(**common)
    ref_chosen = 0.0 * detached(chosen) if m.reference_free else _ld(x.ref_chosen, x.ref_chosen_shared, m)
    ref_rejected = 0.0 * detached(rejected) if m.reference_free else _ld(x.ref_rejected, x.ref_rejected_shared, m)
    delta_chosen, delta_rejected = chosen - ref_chosen, rejected - ref_rejected
    return Numbers(
        **common,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        delta_chosen=delta_chosen,
        delta_rejected=delta_rejected,
        score_chosen=f_score(delta_chosen, m.f_divergence, m.f_alpha),
        score_rejected=f_score(delta_rejected, m.f_divergence, m.f_alpha),
    )


def _ld(full: Array, shared: Array, modifiers: Modifiers) -> Array:
    """Σ_{t≤m} + a·Σ_{t>m}, m = min(nc, nr). LD-DPO, arXiv 2409.06411."""
    if modifiers.ld_alpha is None:
        return full
    return shared + modifiers.ld_alpha * (full - shared)


def _wpo(full: Array, log_sum_sq: Array, tokens: Array) -> Array:
    """exp(mean_t(log p_t − log Σ_v p_v²)), a constant for differentiation. WPO, arXiv 2406.11827 eq. 2."""
    return exp((detached(full) - log_sum_sq) / tokens)


def evaluate(loss: ResolvedLoss, x: Inputs) -> Array:
    """The loss of every pair, shape (pairs,), not reduced. Overflow stays inf or NaN here.

    A custom loss reads columns, not `Inputs`: derive.py calls it.
    """
    values = numbers(loss, x)
    total: Array = None
    for term in loss.terms:
        value = term.loss.formula(values, term.settings)
        value = value if term.weight == 1.0 else term.weight * value
        total = value if total is None else total + value
    if not loss.modifiers.wpo:
        return total
    chosen = _wpo(x.policy_chosen, x.policy_chosen_log_sum_sq_probs, x.chosen_tokens)
    return total * (chosen * _wpo(x.policy_rejected, x.policy_rejected_log_sum_sq_probs, x.rejected_tokens))
