"""From the loss that a user asked for (`LossSpec`) to a loss that can be computed (`ResolvedLoss`).

A name is `sigmoid`, a weighted sum such as `0.8*sigmoid+0.2*bco_pair+1*sft`, or `path.py:function` (custom.py). Keys
and values of `--loss-param` are checked here; a key that the named loss does not read is refused too, because a
parameter without effect is a mistake. `ResolvedLoss.identity()` holds everything that the numbers depend on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_score.config.schema import LossSpec
from dpo_score.errors import ConfigError, nearest
from dpo_score.losses.custom import CustomLoss, is_custom, load_custom
from dpo_score.losses.formulas import LOSSES, FormulaInputs, Loss, LossSettings, f_score
from dpo_score.losses.ops import Array, detached, exp

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True, slots=True)
class Modifiers:
    """What may be laid over any loss. `ld_alpha` None and `wpo` False: off."""

    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    ld_alpha: float | None = None
    wpo: bool = False
    reference_free: bool = False
    offset_column: str | None = None


def _not_negative(value: float) -> bool:
    return value >= 0.0


NUMBERS: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "gamma_beta_ratio": (_not_negative, "at least 0"),
    "lambda": (_not_negative, "at least 0"),
    "alpha": (_not_negative, "at least 0"),
    "tau": (lambda value: value > 0.0, "above 0"),
    "kl": (_not_negative, "at least 0 (a KL divergence in nats)"),
    "f_alpha": (math.isfinite, "a finite number"),
    "ld_alpha": (lambda value: 0.0 <= value <= 1.0, "between 0 and 1"),
}
FLAGS = ("wpo", "reference_free")
KEYS = (*NUMBERS, *FLAGS, "f_divergence", "offset_column")


LARGEST = 1e12
"""The largest β, weight or parameter: beyond, rewards and their squares leave the range of float64."""


def checked_number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    allowed, words = NUMBERS[key]
    if isinstance(value, bool) or not abs(number) <= LARGEST or not allowed(number):
        raise ConfigError(f"loss parameter {key}={value!r}: must be {words}, at most {LARGEST:g}")
    return number


def checked_flag(key: str, value: Any) -> bool:
    known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    flag = known.get(str(value).lower())
    if flag is None:
        raise ConfigError(f"loss parameter {key}={value!r}: must be true or false")
    return flag


def _checked_divergence(value: Any) -> str:
    if value not in DIVERGENCES:
        raise ConfigError(f"loss parameter f_divergence={value!r}: {nearest(str(value), DIVERGENCES)}")
    return str(value)


def check_keys(params: Mapping[str, Any], losses: Sequence[Loss], name: str) -> None:
    """Refuse unknown keys and those that no term of the loss reads."""
    readable = {"ld_alpha", "wpo", "reference_free"}.union(*(loss.params for loss in losses))
    readable |= {"f_divergence", "f_alpha"} if all(loss.f_divergence for loss in losses) else set()
    readable |= {"offset_column"} if any(loss.offset for loss in losses) else set()
    for key in params:
        if key not in KEYS:
            raise ConfigError(f"unknown loss parameter {key!r}: {nearest(key, KEYS)}")
        if key not in readable and not (key == "f_divergence" and params[key] == "reverse_kl"):
            raise ConfigError(
                f"loss {name!r} does not read the parameter {key!r}; it reads {', '.join(sorted(readable))}"
            )


def parse_modifiers(params: Mapping[str, Any]) -> Modifiers:
    """The modifiers among checked keys. `f_alpha` without alpha_divergence is refused."""
    divergence = _checked_divergence(params.get("f_divergence", "reverse_kl"))
    if "f_alpha" in params and divergence != "alpha_divergence":
        raise ConfigError("loss parameter f_alpha is read only with f_divergence=alpha_divergence")
    ld_alpha = params.get("ld_alpha")
    column = params.get("offset_column")
    return Modifiers(
        f_divergence=divergence,
        f_alpha=checked_number("f_alpha", params.get("f_alpha", 0.5)),
        ld_alpha=None if ld_alpha is None else checked_number("ld_alpha", ld_alpha),
        wpo=checked_flag("wpo", params.get("wpo", False)),
        reference_free=checked_flag("reference_free", params.get("reference_free", False)),
        offset_column=None if column is None else str(column),
    )


__all__ = ["LOSSES", "Loss", "LossInputs", "ResolvedLoss", "Term", "evaluate", "formula_inputs", "parse_loss"]

_TERM = re.compile(r"(?:([0-9.eE+-]+)\*)?([A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
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
    settings: LossSettings


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
    if not abs(weight) <= LARGEST:
        raise ConfigError(f"the weight {match[1]!r} in the loss {whole!r} is not a finite number up to {LARGEST:g}")
    return weight, LOSSES[match[2]]


def _checked_beta(beta: float) -> float:
    if not 1.0 / LARGEST <= beta <= LARGEST:
        raise ConfigError(
            f"beta={beta!r}: must be a finite number above 0, from {1.0 / LARGEST:g} to {LARGEST:g} (usual: 0.01 to 10)"
        )
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


def _settings(spec: LossSpec, loss: Loss, beta: float) -> LossSettings:
    params = {key: checked_number(key, spec.params.get(key, default)) for key, default in loss.params.items()}
    if loss.label_smoothing is None:
        return LossSettings(beta, 0.0, params)
    epsilon = loss.label_smoothing if spec.label_smoothing is None else float(spec.label_smoothing)
    _check_smoothing(epsilon, loss.name)
    return LossSettings(beta, epsilon, params)


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


def formula_inputs(loss: ResolvedLoss, x: LossInputs) -> FormulaInputs:
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
        return FormulaInputs(**common)
    ref_chosen = 0.0 * detached(chosen) if m.reference_free else _ld(x.ref_chosen, x.ref_chosen_shared, m)
    ref_rejected = 0.0 * detached(rejected) if m.reference_free else _ld(x.ref_rejected, x.ref_rejected_shared, m)
    delta_chosen, delta_rejected = chosen - ref_chosen, rejected - ref_rejected
    return FormulaInputs(
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


def evaluate(loss: ResolvedLoss, x: LossInputs) -> Array:
    """The loss of every pair, shape (pairs,), not reduced. Overflow stays inf or NaN here.

    A custom loss reads columns, not `LossInputs`: columns.py calls it.
    """
    values = formula_inputs(loss, x)
    total: Array = None
    for term in loss.terms:
        value = term.loss.formula(values, term.settings)
        value = value if term.weight == 1.0 else term.weight * value
        total = value if total is None else total + value
    if not loss.modifiers.wpo:
        return total
    chosen = _wpo(x.policy_chosen, x.policy_chosen_log_sum_sq_probs, x.chosen_tokens)
    return total * (chosen * _wpo(x.policy_rejected, x.policy_rejected_log_sum_sq_probs, x.rejected_tokens))
