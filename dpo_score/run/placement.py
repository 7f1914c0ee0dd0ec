"""Models larger than a device: what is refused before anything is loaded, and what is said.

`--tensor-parallel N` deals every layer out to N devices, by transformers' plan for the architecture;
`--device-map auto` (accelerate) puts whole layers on different devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from math import gcd
from typing import Any

from dpo_score.config import ComputeSpec
from dpo_score.errors import ConfigError
from dpo_score.logps.numerics import text_config
from dpo_score.logps.source import ModelSource

ALTERNATIVE = "--device-map auto spreads the layers of a model over all GPUs of one machine instead"


def check_placement(compute: ComputeSpec, sources: Iterable[ModelSource], say: Callable[[str], None]) -> None:
    """ConfigError for a --tensor-parallel or --device-map that cannot be; one line about the latter."""
    if compute.tensor_parallel > 1:
        _refuse_together(compute)
        for source in sources:
            _refuse_undealt(source, compute.tensor_parallel)
            _refuse_uneven(source.name, source.config, compute.tensor_parallel)
    if compute.device_map is not None:
        if find_spec("accelerate") is None:
            raise ConfigError(
                f"--device-map {compute.device_map} needs accelerate, which is not installed: pip install accelerate"
            )
        say(
            f"--device-map {compute.device_map}: the layers of a model are spread over the GPUs, of which one computes "
            "at a time; it makes room, not speed"
        )


def key_value_heads(config: Mapping[str, Any]) -> int:
    """Heads that keys and values have; as many as queries where the configuration names no other number."""
    return int(text_config(config).get("num_key_value_heads") or attention_heads(config))


def attention_heads(config: Mapping[str, Any]) -> int:
    """Heads that queries have."""
    text = text_config(config)
    return int(text.get("num_attention_heads") or text.get("n_head") or 1)


def _refuse_together(compute: ComputeSpec) -> None:
    """Options that say otherwise how a model is laid out or run."""
    for flag, given in (
        ("--device-map", compute.device_map is not None),
        ("--quantization", compute.quantization is not None),
        ("--compile on", compute.compile == "on"),
        ("--device mps", compute.device == "mps"),
    ):
        if given:
            raise ConfigError(f"--tensor-parallel {compute.tensor_parallel} and {flag} do not go together: choose one")


def _refuse_undealt(source: ModelSource, ways: int) -> None:
    """Models that nobody has a plan for."""
    from dpo_score.logps.tensor_parallel import has_plan

    kind = source.config.get("model_type")
    if source.is_encoder_decoder or not has_plan(source.config):
        raise ConfigError(
            f"--tensor-parallel {ways}: transformers has no plan to deal out the layers of {kind!r} models "
            f"({source.name}); {ALTERNATIVE}"
        )
    if "quantization_config" in source.config:
        raise ConfigError(f"--tensor-parallel {ways}: the weights of {source.name} are quantised; {ALTERNATIVE}")


def _refuse_uneven(name: str, config: Mapping[str, Any], ways: int) -> None:
    heads, keys = attention_heads(config), key_value_heads(config)
    if heads % ways == 0 and keys % ways == 0:
        return
    even = ", ".join(str(n) for n in range(1, gcd(heads, keys) + 1) if gcd(heads, keys) % n == 0)
    what = f"{keys} key-value heads" if keys % ways else f"{heads} attention heads"
    raise ConfigError(
        f"--tensor-parallel {ways}: {name} has {what}, which cannot be dealt out evenly to {ways} devices; "
        f"{even} would do"
    )
