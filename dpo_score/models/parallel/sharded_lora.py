"""LoRA over a base that several ranks hold between them: added beside the layers, each rank with its part of A or B.

A layer sharded by outputs gets its rows of B, one sharded by inputs its columns of A (and one sum of r numbers a
token more). Nothing is merged, so the base stays as it was read. Products are fp32, as peft's are over 16-bit bases.
Does not: anything but plain LoRA of linear layers; all else is refused, naming the way out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dpo_score.errors import ModelError
from dpo_score.models.adapter_files import PREFIX
from dpo_score.models.lora import read_config, read_weights, starts_from_base
from dpo_score.models.parallel.process_group import group_of
from dpo_score.models.resolve import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_score.models.parallel.process_group import Group

UNDERSTOOD = frozenset(
    {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "fan_in_fan_out"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"}
    | {"task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
    | {"runtime_config", "ensure_weight_tying"}
)
"""Settings of peft's LoraConfig that plain LoRA may have: what they say is in the tensors' names and shapes, computed
here, or of no effect on a forward pass. Any other that is not at its default makes another kind of adapter."""
TENSOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(slots=True, eq=False)
class ShardedSlot:
    """A base model in parts and the adapter beside it at the moment, if any."""

    model: Any
    notes: tuple[str, ...] = ()
    _worn: str | None = None
    _handles: list[Any] = field(default_factory=list)

    def put(self, source: ModelSource) -> None:
        """Make `model` this rank's part of the model of `source`, whose base it already holds."""
        wanted = source.digest if source.adapter else None
        if wanted == self._worn:
            return
        while self._handles:
            self._handles.pop().remove()
        self._worn = None
        if source.adapter is not None:
            self._put_on(source)
            self._worn = wanted

    def _put_on(self, source: ModelSource) -> None:
        config = read_config(source)
        group = group_of(self.model)
        assert group is not None, "a model in parts belongs to a group"
        _refuse_variant(source, config)
        layers = _layers(source, config, read_weights(source))
        modules = dict(self.model.named_modules())
        hooks = {name: _beside(source, name, modules.get(name), *factors, group) for name, factors in layers.items()}
        self._handles = [modules[name].register_forward_hook(hook) for name, hook in hooks.items()]


def _refuse_variant(source: ModelSource, config: Any) -> None:
    from peft import LoraConfig

    if type(config) is not LoraConfig:
        raise _refusal(source, f"the type {getattr(config.peft_type, 'value', config.peft_type)}")
    usual = LoraConfig()
    settings = {name: value for name, value in vars(config).items() if name not in UNDERSTOOD}
    unusual = [f"{name}={value!r}" for name, value in settings.items() if value != getattr(usual, name, None)]
    if starts_from_base(config):
        unusual.append(f"init_lora_weights={config.init_lora_weights!r}")
    if unusual:
        raise _refusal(source, ", ".join(unusual)[:200])


def _layers(source: ModelSource, config: Any, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → A [r, in] and B [out, r], the scale in B; ModelError for anything that is not plain LoRA."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        match = TENSOR.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise _refusal(source, f"{key} of shape {tuple(tensor.shape)}")
        found.setdefault(match["module"], {})[match["factor"]] = tensor.float()
    for module, factors in found.items():
        if factors.keys() != {"A", "B"}:
            raise ModelError(f"{source.name}: the adapter {source.adapter} has but one of two factors for {module}")
    return {name: (f["A"], f["B"] * _scale(config, name, f["A"].shape[0])) for name, f in found.items()}


def _scale(config: Any, module: str, rank: int) -> float:
    """alpha / r, or alpha / √r with rsLoRA; alpha by module where the adapter has a pattern for it."""
    from peft.utils.other import get_pattern_key

    pattern = config.alpha_pattern or {}
    alpha = float(pattern.get(get_pattern_key(pattern.keys(), module), config.lora_alpha))
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _beside(
    source: ModelSource, name: str, module: Any, a_RI: Tensor, b_OR: Tensor, group: Group
) -> Callable[[Any, Any, Tensor], Tensor]:
    """A forward hook that adds B A x to what this rank's part of a linear layer gives."""
    head = name.rsplit(".", 1)[-1] in ("lm_head", "embed_out", "output")
    if type(module) is not torch.nn.Linear or head:
        raise _refusal(source, f"LoRA on {name}")
    if (module.in_features, module.out_features) != (a_RI.shape[1], b_OR.shape[0]):
        raise ModelError(f"{source.name}: {name} is {module.in_features} → {module.out_features}, its adapter is not")
    by_inputs = module.weight.shape[1] != module.in_features
    if by_inputs:
        a_RI = a_RI[:, slice(*group.part(module.in_features))]
    elif module.weight.shape[0] != module.out_features:
        b_OR = b_OR[slice(*group.part(module.out_features))]
    a, b = a_RI.T.contiguous().to(module.weight.device), b_OR.T.contiguous().to(module.weight.device)

    def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inner = inputs[0].float() @ a
        return (output + (group.sum(inner) if by_inputs else inner) @ b).to(output.dtype)

    return hook


def _refusal(source: ModelSource, what: str) -> ModelError:
    return ModelError(
        f"{source.name}: with --tensor-parallel an adapter may be plain LoRA on linear layers of the body; this one "
        f"has {what}. Merge it into its base first (peft: merge_and_unload, save_pretrained), or use --device-map auto"
    )
