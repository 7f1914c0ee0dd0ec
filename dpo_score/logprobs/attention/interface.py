"""Attention over a pack with shared prompts, plugged into transformers under a private name.

No model is patched: `AttentionInterface` hands query, key and value of every layer to `forward` here, which computes
each segment of the pack (`packing.Segment`) against its prompt and itself. transformers builds no mask for a name it
does not know, so what the mask would have said is computed here: causality and sliding windows. Soft caps, attention
sinks and grouped heads are supported; anything else that a layer asks for raises `Unshareable`, and the model is
scored on the plain path. The pack in use is process-wide state, set by `sharing`: one pack is computed at a time.

A new kernel is a class with the two members of `PreparedPack`; `packed.prepared_pack` chooses among them:

    >>> class OneSequence:  # of three tokens
    ...     tokens = 3
    ...     def attend(self, query, key, value, sinks, scale, window, softcap):
    ...         later = torch.ones(3, 3).triu(1).bool()
    ...         weights = (query @ key.mT * scale).masked_fill(later, float("-inf")).softmax(-1)
    ...         return (weights @ value).transpose(1, 2)
    >>> ones = torch.ones(1, 2, 3, 4)
    >>> OneSequence().attend(ones, ones, ones, None, 0.5, 0, 0.0).shape  # [1, T, Hq, E]
    torch.Size([1, 3, 2, 4])

Shapes: Hq, Hk query and key heads; T tokens of the pack; D, E head sizes of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

NAME = "dpo_score_shared"
"""Registered name. It must not contain the name of a stock implementation: transformers matches substrings."""
BENIGN = frozenset({"position_ids", "cache_position", "position_embeddings", "output_attentions", "use_cache"})
"""Arguments that some layers pass along for other kernels and that carry no mask."""


class Unshareable(Exception):
    """A layer needs something that a shared pack cannot give: the model is scored on the plain path."""


class PreparedPack(Protocol):
    """One pack as a kernel wants it, made once and used by every layer."""

    @property
    def tokens(self) -> int:
        """T."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
    ) -> Tensor:
        """query [1, Hq, T, D], key [1, Hk, T, D], value [1, Hk, T, E], sinks [Hq] → [1, T, Hq, E].

        `window`, `softcap`: 0 for none.
        """


_in_use: list[PreparedPack] = []


@contextmanager
def sharing(pack: PreparedPack) -> Iterator[None]:
    """`forward` computes this pack inside the block."""
    _in_use.append(pack)
    try:
        yield
    finally:
        _in_use.pop()


@contextmanager
def installed(model: Any) -> Iterator[dict[str, str]]:
    """The model's attention goes through this module inside the block; what it had before, which is given to the
    block, comes back after."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, forward)
    before = _implementations(model.config)
    model.set_attn_implementation(NAME)
    try:
        yield before
    finally:
        model.set_attn_implementation(before)


@contextmanager
def as_loaded(model: Any, before: dict[str, str]) -> Iterator[None]:
    """Inside the block, which may be one of `installed`, the model has the attention that it had `before`."""
    model.set_attn_implementation(before)
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)


def _implementations(config: Any) -> dict[str, str]:
    """The attention of a model and of each of its parts, as `set_attn_implementation` takes it."""
    parts = {"": config, **{name: getattr(config, name, None) for name in config.sub_configs}}
    found = {name: getattr(part, "_attn_implementation", None) for name, part in parts.items()}
    return {name: implementation for name, implementation in found.items() if implementation}


def forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, Hq, T, D], key [1, Hk, T, D], value [1, Hk, T, E] → [1, T, Hq, E]."""
    _refuse(module, query, attention_mask, dropout, is_causal, others)
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    out = shared_attention(query, key, value, s_aux, scale, int(sliding_window or 0), float(softcap or 0.0))
    return out, None


def _refuse(
    module: torch.nn.Module,
    query: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    others: dict[str, Any],
) -> None:
    name = type(module).__name__
    if mask is not None:
        raise Unshareable(f"{name} brings a mask of its own")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise Unshareable(f"{name} is not causal")
    if dropout:
        raise Unshareable(f"{name} drops out: the model is in training mode")
    if query.shape[0] != 1:
        raise Unshareable(f"{name} attends over a batch of {query.shape[0]}, not over one pack")
    for argument, given in others.items():
        if isinstance(given, Tensor) and argument not in BENIGN:
            raise Unshareable(f"{name} passes {argument!r}, which shared attention does not know")


@torch.library.custom_op("dpo_score::shared_attention", mutates_args=())
def shared_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
) -> Tensor:
    """One layer over the pack in use. An operator of its own, so that a compiled layer calls it unchanged.

    `window`, `softcap`: 0 for none. A window of W lets a token see itself and the W − 1 tokens before it.
    """
    assert _in_use, "shared attention runs inside sharing(pack)"
    pack = _in_use[-1]
    if query.shape[2] != pack.tokens:
        raise Unshareable(f"a layer attends over {query.shape[2]} tokens of a pack of {pack.tokens}")
    return pack.attend(query, key, value, sinks, scale, window, softcap)


@shared_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
