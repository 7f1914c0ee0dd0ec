"""Models larger than a device: what is refused before anything is loaded, and what is said.

`--tensor-parallel N` deals every layer out to N devices, by transformers' plan for the architecture;
`--device-map auto` (accelerate) puts whole layers on different devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec

from dpo_score.config.schema import ComputeSpec
from dpo_score.errors import ConfigError
from dpo_score.models.parallel.sharding import refuse_undealt
from dpo_score.models.resolve import ModelSource


def check_placement(compute: ComputeSpec, sources: Iterable[ModelSource], say: Callable[[str], None]) -> None:
    """ConfigError for a --tensor-parallel or --device-map that cannot be; one line about the latter."""
    if compute.tensor_parallel > 1:
        _refuse_together(compute)
        for source in sources:
            refuse_undealt(source, compute.tensor_parallel)
    if compute.device_map is not None:
        if find_spec("accelerate") is None:
            raise ConfigError(
                f"--device-map {compute.device_map} needs accelerate, which is not installed: pip install accelerate"
            )
        say(
            f"--device-map {compute.device_map}: the layers of a model are spread over the GPUs, of which one computes "
            "at a time; it makes room, not speed"
        )


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
