"""`--loss-param KEY=VALUE`: the known keys, their types and ranges. Wrong keys and values are ConfigErrors.

A key that the named loss does not read is refused too: a parameter without effect is a mistake worth seeing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_score.errors import ConfigError, nearest
from dpo_score.losses.registry import Loss

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


def checked_number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    allowed, words = NUMBERS[key]
    if isinstance(value, bool) or not math.isfinite(number) or not allowed(number):
        raise ConfigError(f"loss parameter {key}={value!r}: must be {words}")
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
