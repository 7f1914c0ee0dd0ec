"""Models larger than a device: what is refused before anything is loaded, and what is said.

`--device-map auto` (accelerate) is the way there is. Tensor parallelism is checked and then refused: it is not built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dpo_score.config import ComputeSpec
from dpo_score.errors import ConfigError
from dpo_score.logps.numerics import text_config
from dpo_score.logps.source import ModelSource


def check_placement(compute: ComputeSpec, sources: Iterable[ModelSource], say: Callable[[str], None]) -> None:
    """ConfigError for a --tensor-parallel that cannot be; one line about --device-map."""
    if compute.tensor_parallel > 1:
        for source in sources:
            _refuse_uneven(source.name, source.config, compute.tensor_parallel)
        raise ConfigError(
            f"--tensor-parallel {compute.tensor_parallel}: this version does not split single layers over devices; "
            "--device-map auto spreads the layers of a model over all GPUs of one machine"
        )
    if compute.device_map is not None:
        say(
            f"--device-map {compute.device_map}: the layers of a model are spread over the GPUs, of which one computes "
            "at a time; it makes room, not speed"
        )


def key_value_heads(config: Mapping[str, Any]) -> int:
    """Heads that keys and values have; as many as queries where the configuration names no other number."""
    text = text_config(config)
    return int(text.get("num_key_value_heads") or text.get("num_attention_heads") or text.get("n_head") or 1)


def _refuse_uneven(name: str, config: Mapping[str, Any], ways: int) -> None:
    heads = key_value_heads(config)
    if heads % ways:
        even = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(
            f"--tensor-parallel {ways}: {name} has {heads} key-value heads, which cannot be dealt out evenly to {ways} "
            f"devices; {even} would do"
        )
