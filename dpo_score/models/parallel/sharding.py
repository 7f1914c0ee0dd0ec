"""Weights sharded over the ranks of a group by transformers' own plan, and made plain tensors again.

transformers shards while it reads, so a rank holds no more than its part, and adds the collectives to the layers that
need them. Its DTensors are replaced by the local tensors they wrap: the same numbers by shorter ways, and tensors that
can be widened to fp32. That it is the same function is checked on a few tokens, each time a model is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.distributed.tensor import DTensor, Shard
from transformers import CONFIG_MAPPING
from transformers.distributed import DistributedConfig

from dpo_score.errors import ConfigError, ModelError
from dpo_score.models.limits import text_config
from dpo_score.models.parallel.process_group import group_of
from dpo_score.models.parts import TOLERANCE
from dpo_score.models.resolve import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

ALTERNATIVE = "--device-map auto spreads the layers of a model over all GPUs of one machine instead"
PROBE_IDS = range(7, 19)


def has_plan(config: Mapping[str, Any]) -> bool:
    """Whether transformers knows how to shard the layers of an architecture, from config.json alone."""
    kinds = (config.get("model_type"), text_config(config).get("model_type"))
    known = [CONFIG_MAPPING[kind] for kind in kinds if kind in CONFIG_MAPPING]
    parts = [part for kind in known for part in (kind, kind.sub_configs.get("text_config"))]
    return any(getattr(part, "base_model_tp_plan", None) for part in parts)


def key_value_heads(config: Mapping[str, Any]) -> int:
    """Heads that keys and values have; as many as queries where the configuration names no other number."""
    return int(text_config(config).get("num_key_value_heads") or attention_heads(config))


def attention_heads(config: Mapping[str, Any]) -> int:
    """Heads that queries have."""
    text = text_config(config)
    return int(text.get("num_attention_heads") or text.get("n_head") or 1)


def refuse_undealt(source: ModelSource, ways: int) -> None:
    """ConfigError for a model that cannot be sharded over `ways` ranks, from its configuration alone."""
    _refuse_old_transformers(ways)
    kind = source.config.get("model_type")
    if source.is_encoder_decoder or not has_plan(source.config):
        raise ConfigError(
            f"--tensor-parallel {ways}: transformers has no plan to shard the layers of {kind!r} models "
            f"({source.name}); {ALTERNATIVE}"
        )
    if "quantization_config" in source.config:
        raise ConfigError(f"--tensor-parallel {ways}: the weights of {source.name} are quantised; {ALTERNATIVE}")
    _refuse_uneven(source.name, attention_heads(source.config), key_value_heads(source.config), ways)


def _refuse_uneven(name: str, heads: int, keys: int, ways: int) -> None:
    if heads % ways == 0 and keys % ways == 0:
        return
    even = ", ".join(str(n) for n in range(1, gcd(heads, keys) + 1) if gcd(heads, keys) % n == 0)
    what = f"{keys} key-value heads" if keys % ways else f"{heads} attention heads"
    raise ConfigError(
        f"--tensor-parallel {ways}: {name} has {what}, which cannot be divided evenly over {ways} devices; "
        f"{even} would do"
    )


def _refuse_old_transformers(ways: int) -> None:
    if "tp_size" not in inspect.signature(DistributedConfig).parameters:
        raise ConfigError(
            f"--tensor-parallel {ways}: transformers {transformers.__version__} is too old for it (5.23 is not); "
            f"{ALTERNATIVE}"
        )


def load_options(size: int) -> dict[str, Any]:
    """What `from_pretrained` takes to shard a model over the `size` ranks that have joined."""
    return {"distributed_config": DistributedConfig(tp_size=size)}


def localized(model: Any) -> Any:
    """`model` with plain local tensors for parameters; ModelError when it computes something else then."""
    group = group_of(model)
    assert group is not None, "a model is sharded over the ranks of a group"
    before = _logits(model)
    local: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                own = local.setdefault(id(parameter), torch.nn.Parameter(parameter.to_local(), requires_grad=False))
                module._parameters[name] = own
                if isinstance(module, torch.nn.Embedding):
                    _look_up_locally(module, parameter, group)
    _refuse_other(model, before, _logits(model))
    return model


def _look_up_locally(module: Any, sharded: Any, group: Any) -> None:
    """An embedding of which this rank holds some rows, or columns: what the ranks find makes the whole."""
    (placement,) = (p for p in sharded.placements if isinstance(p, Shard))
    if placement.dim != 0:
        raise ModelError(
            f"--tensor-parallel: {type(module).__name__} is sharded by columns, which is not supported; "
            "--device-map auto spreads whole layers over the devices of one machine"
        )
    first, end = group.part(sharded.shape[0])
    whole = type(module).forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        mine = (ids >= first) & (ids < end)
        found = whole(module, (ids - first).clamp(0, max(end - first - 1, 0)))
        summed: torch.Tensor = group.sum(torch.where(mine[..., None], found, torch.zeros_like(found)))
        return summed

    module.forward, module.padding_idx = forward, None  # which only steers gradients


def _logits(model: Any) -> Tensor:
    rows = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.tensor([[i % rows for i in PROBE_IDS]], device=model.device)
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _refuse_other(model: Any, before: Tensor, after: Tensor) -> None:
    if not bool(before.isfinite().all()):  # a probe that overflows 16 bits says nothing
        return
    worst = float((after - before).abs().max() / before.abs().max().clamp_min(1e-6))
    if not worst <= TOLERANCE[model.dtype]:
        raise ModelError(
            f"--tensor-parallel: {type(model).__name__} under transformers {transformers.__version__} computes "
            f"otherwise once its weights are plain tensors (logits off by {worst:.1e}): use --device-map auto"
        )
