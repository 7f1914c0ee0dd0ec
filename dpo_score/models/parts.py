"""Where a causal language model keeps its body and its head, found once and checked against its own logits.

The body turns ids into hidden states; the head turns hidden states into logits with what the model applies on the
way: bias, a scale (Cohere, Granite, Falcon-H1, …), a soft cap (Gemma). Nothing is guessed by shape: `model_parts`
compares the parts with `model(...).logits` on a few tokens, and a model that does not match is read through its
own logits (`ModelParts.head` is None).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpo_score.errors import ModelError
from dpo_score.models.parallel.process_group import Group, group_of

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap")
MULTIPLYING_SCALINGS = ("hyperclovax", "hyperclovax_vision_v2")
"""Families whose `logits_scaling` multiplies; elsewhere (Granite) it divides."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-8}
"""Largest |our logit − the model's| over the largest |logit|: a missed scale or cap is far above it."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """logits = cap·tanh(scale·(W h + b) / cap). `module` computes W h + b; `weight` [V, H] is None when it is
    no plain linear layer (a LoRA on the head), and then only `module` may be called. `bias` is [V].

    `group`: its ranks share the vocabulary, and V here is the size of this rank's part of it, from entry `first` on.
    """

    module: nn.Module
    weight: Tensor | None
    bias: Tensor | None
    scale: float = 1.0
    cap: float | None = None
    group: Group | None = None
    first: int = 0

    @property
    def vocabulary(self) -> int:
        """Logits per position that `logits` gives."""
        weight: Any = self.module.weight if self.weight is None else self.weight
        return int(weight.shape[0])

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """The model's logits [N, V] in fp32; wider hidden states than weights are multiplied as they are."""
        alone = self.group is None and self.weight is not None and hidden_NH.dtype == self.weight.dtype
        if self.weight is None or alone:
            return self.shape(self.module(hidden_NH).float())
        bias = None if self.bias is None else self.bias.to(hidden_NH.dtype)
        return self.shape(nn.functional.linear(hidden_NH, self.weight.to(hidden_NH.dtype), bias).float())

    def shape(self, raw_NV: Tensor) -> Tensor:
        """Scale and soft cap, in place on an fp32 tensor of raw products."""
        return shaped(raw_NV, self.scale, self.cap)


def shaped(raw_NV: Tensor, scale: float, cap: float | None) -> Tensor:
    """The logits of raw products, in place."""
    if scale != 1.0:
        raw_NV.mul_(scale)
    if cap is not None:
        raw_NV.div_(cap).tanh_().mul_(cap)
    return raw_NV


@dataclass(frozen=True, slots=True, eq=False)
class ModelParts:
    """`model` as called for logits, `body` for hidden states, `head` None if only the model's own logits serve.

    `stateful`: recurrent or convolutional layers, for which padding is not to be trusted.
    """

    model: Any
    body: Any
    head: Head | None
    stateful: bool

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return torch.device(self.model.get_input_embeddings().weight.device)

    @property
    def out_device(self) -> torch.device:
        """Where logits come out: another device than `device` when a model is spread over several."""
        module = self.model.get_output_embeddings()
        return self.device if module is None else torch.device(module.weight.device)

    def hidden(self, ids_BT: Tensor, **inputs: Any) -> Tensor:
        """Hidden states [B, T, H] after the last norm."""
        out = self.body(input_ids=ids_BT, use_cache=False, return_dict=True, **inputs)
        return out.last_hidden_state.to(self.out_device)  # type: ignore[no-any-return]


def model_parts(model: Any) -> ModelParts:
    """The parts of a loaded causal model (a PEFT model is seen through its adapter). Runs six tokens twice."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = model.base_model
    stateful = bool(getattr(model, "_is_stateful", False) or getattr(body, "_is_stateful", False))
    parts = ModelParts(model, body, _head(model), stateful)
    if body is model or parts.head is None or not _matches(parts):
        return ModelParts(model, body, None, stateful)
    return parts


def _head(model: Any) -> Head | None:
    module = model.get_output_embeddings()
    if module is None:
        return None
    plain = type(module) is nn.Linear
    scale, cap = _scale_and_cap(model.config)
    head = Head(module, module.weight if plain else None, module.bias if plain else None, scale, cap)
    group = group_of(model)
    return head if group is None else _shared(head, group)


def _shared(head: Head, group: Group) -> Head | None:
    """This rank's part of a head, whether its weights are sharded already or every rank has all of them."""
    if head.weight is None:
        return None
    first, end = group.part(int(head.module.out_features))  # type: ignore[arg-type]
    if len(head.weight) == end - first:
        return replace(head, group=group, first=first)
    bias = None if head.bias is None else head.bias[first:end]
    return replace(head, weight=head.weight[first:end], bias=bias, group=group, first=first)


def _scale_and_cap(config: Any) -> tuple[float, float | None]:
    text = config.get_text_config(decoder=True)
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= float(getattr(text, name, None) or 1.0)
    if scaling := getattr(text, "logits_scaling", None):
        scale = scale * scaling if config.model_type in MULTIPLYING_SCALINGS else scale / scaling
    caps = [float(value) for name in CAPS if (value := getattr(text, name, None))]
    return scale, caps[0] if caps else None


@torch.inference_mode()
def _matches(parts: ModelParts) -> bool:
    model, head = parts.model, parts.head
    assert head is not None
    embedding = model.get_input_embeddings()
    if embedding is None:
        raise ModelError(f"{type(model).__name__} has no token embedding: it cannot score token ids")
    rows = int(embedding.weight.shape[0])
    ids = torch.arange(7, 13, device=parts.device)[None] % rows
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = parts.hidden(ids)[0]
    if head.weight is not None and hidden.shape[-1] != head.weight.shape[1]:  # more than a linear layer lies between
        return False
    ours = head.logits(hidden)
    if head.group is None:
        return _alike(ours, own, model.dtype)
    return head.group.agreed(_alike(ours, own[:, head.first : head.first + head.vocabulary], model.dtype), own.device)


def _alike(ours: Tensor, own: Tensor, dtype: torch.dtype) -> bool:
    if ours.shape != own.shape:
        return False
    worst = float((ours - own).abs().amax() / own.abs().amax().clamp_min(1e-6)) if own.numel() else 0.0
    return worst <= TOLERANCE[dtype] or not bool(torch.isfinite(own).all())
