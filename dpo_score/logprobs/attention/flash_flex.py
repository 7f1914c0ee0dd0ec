"""Shared attention on CUDA: torch's own flash kernel for sequences of different lengths, over gathered keys;
FlexAttention where that cannot be used; batched products (bmm.py) last. In fp32, which neither takes, the
memory-efficient kernel with the same keys, or batched products for windows, soft caps and sinks.

A segment of a pack is one item of the flash kernel, whose keys are its prompt and itself: the kernel aligns a causal
mask with the last key, which is exactly the rule of `packing.Segment`, and needs no mask object. The operator's schema
is looked at before it is called, because it moved between torch versions. Attention sinks enter through the
log-sum-exp that the kernel returns. Every choice here is checked on the loaded model by self_check.py.

Shapes: T tokens, S gathered keys; Hq, Hk heads; D, E head sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from dpo_score.logprobs.attention.bmm import bmm_attention
from dpo_score.logprobs.packing import BUCKETS, Pack
from dpo_score.logprobs.transfer import to_device
from dpo_score.models.numerics import Kernel

FLASH_HEAD = 256
"""Largest head size of the flash kernel."""
FLEX_BLOCK = 128
FLEX_SHAPES = 8 * BUCKETS
"""Compiled forms at most: by size of the pack, with and without a window, and of groups larger than a pack."""
NEEDED = ("cum_seq_q", "max_q", "is_causal", "scale", "window_size_left", "window_size_right")
"""Arguments without which the flash operator cannot do what a segment asks."""


EFFICIENT = (
    *("query", "key", "value", "bias", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    *("dropout_p", "custom_mask_type", "compute_log_sumexp"),
)
"""Arguments of the memory-efficient operator by position."""
CAUSAL_FROM_THE_END = 2
"""Its mask that aligns the last query with the last key, as the flash kernel does."""
FLASH_CAPABILITY = (8, 0)
"""The flash kernel needs Ampere or newer, and is part of the operators of every CUDA build all the same."""


@cache
def kernel() -> Kernel:
    """The best kernel that this torch and its GPU offer. Part of the numerics of a run."""
    if not torch.cuda.is_available():
        return Kernel.BMM
    able = torch.cuda.get_device_capability() >= FLASH_CAPABILITY
    return Kernel.VARLEN if able and _flash_arguments() is not None else Kernel.FLEX


@cache
def _flash_arguments() -> frozenset[str] | None:
    """Argument names of torch's flash operator, or None when it is not there or lacks what we need."""
    operator = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if operator is None or not torch.cuda.is_available():
        return None
    names = frozenset(argument.name for argument in operator.default._schema.arguments)
    return names if names.issuperset(NEEDED) else None


@cache
def _takes_fp32() -> bool:
    """Whether torch's memory-efficient operator is there with the arguments that a segment needs."""
    operator = getattr(torch.ops.aten, "_efficient_attention_forward", None)
    if operator is None:
        return False
    names = [argument.name for argument in operator.default._schema.arguments]
    return names[: len(EFFICIENT)] == list(EFFICIENT) and "scale" in names


@dataclass(frozen=True, slots=True, eq=False)
class CudaPack:
    """What the kernels need of one pack, made once and used by every layer.

    `key_index` [S]: tokens in the order of the segments' keys; `queries`, `keys`: cumulative lengths, int32.
    """

    pack: Pack
    kernel: Kernel
    key_index: Tensor
    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    flex: Any

    @classmethod
    def of(cls, pack: Pack, device: torch.device, kernel: Kernel) -> CudaPack:
        lengths = pack.segment_table[:, 3]
        spans = pack.segment_table[:, 1] + lengths
        return cls(
            pack=pack,
            kernel=Kernel(kernel),
            key_index=to_device(gathered_keys(pack), device),
            queries=to_device(_cumulative(lengths), device),
            keys=to_device(_cumulative(spans), device),
            longest=(int(lengths.max(initial=0)), int(spans.max(initial=0))),
            flex=_Masks(pack),
        )

    @property
    def tokens(self) -> int:
        return len(self.pack.ids)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
    ) -> Tensor:
        """query [1, Hq, T, D], key [1, Hk, T, D], value [1, Hk, T, E] → [1, T, Hq, E]."""
        wide = query.dtype == torch.float32
        if wide and self.kernel == Kernel.VARLEN and _takes_fp32() and sinks is None and not window and not softcap:
            return self._varlen_fp32(query, key, value, scale)
        if wide or self.kernel == Kernel.BMM:
            return bmm_attention(query[0], key[0], value[0], self.pack.segments, scale, window, softcap, sinks)[None]
        head = query.shape[-1]
        if self.kernel == Kernel.VARLEN and not softcap and head == value.shape[-1] <= FLASH_HEAD and head % 8 == 0:
            return self._varlen(query, key, value, sinks, scale, window)
        return self._flex(query, key, value, sinks, scale, window, softcap)

    def _varlen(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int
    ) -> Tensor:
        gathered, queries, keys = (t.to(query.device) for t in (self.key_index, self.queries, self.keys))
        out, mass = torch.ops.aten._flash_attention_forward(
            query[0].transpose(0, 1).contiguous(),
            key[0].transpose(0, 1).index_select(0, gathered),
            value[0].transpose(0, 1).index_select(0, gathered),
            queries,
            keys,
            *self.longest,
            0.0,
            True,
            False,
            scale=scale,
            window_size_left=window - 1 if window else None,
            window_size_right=0 if window else None,
        )[:2]
        return _with_sinks(out, mass.transpose(0, 1), sinks)[None]

    def _varlen_fp32(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The memory-efficient kernel, which takes fp32 as the flash kernel does not; it knows no shared key heads."""
        gathered, queries, keys = (t.to(query.device) for t in (self.key_index, self.queries, self.keys))
        times = query.shape[1] // key.shape[1]

        def of_each_query_head(heads: Tensor) -> Tensor:
            picked = heads[0].transpose(0, 1).index_select(0, gathered)
            return picked.repeat_interleave(times, 1)[None] if times > 1 else picked[None]

        out: Tensor = torch.ops.aten._efficient_attention_forward(
            query.transpose(1, 2).contiguous(),
            of_each_query_head(key),
            of_each_query_head(value),
            None,
            queries,
            keys,
            *self.longest,
            0.0,
            CAUSAL_FROM_THE_END,
            False,
            scale=scale,
        )[0]
        return out

    def _flex(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        out, extra = flex()(
            query,
            key,
            value,
            score_mod=_capped(softcap) if softcap else None,
            block_mask=self.flex.mask(window, query.device),
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            **_wants_mass(),
        )
        mass = getattr(extra, "lse", extra)
        return _with_sinks(out[0].transpose(0, 1), mass[0].transpose(0, 1), sinks)[None].contiguous()


def gathered_keys(pack: Pack) -> np.ndarray[Any, Any]:
    """Token indices of every segment's keys, one segment after the other: prompt, then the segment itself."""
    runs = pack.segment_table.reshape(-1, 2)  # (first token, tokens), of the prompt and of the segment in turn
    lengths = runs[:, 1]
    ends = np.cumsum(lengths)
    return np.repeat(runs[:, 0] - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def _cumulative(lengths: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _with_sinks(out_THE: Tensor, mass_TH: Tensor, sinks: Tensor | None) -> Tensor:
    """A sink adds e^sink to the softmax denominator: the output shrinks by Z / (Z + e^sink) = sigmoid(log Z − sink)."""
    if sinks is None:
        return out_THE
    return out_THE * torch.sigmoid(mass_TH - sinks.float())[..., None].to(out_THE.dtype)


@cache
def flex() -> Any:
    """FlexAttention, compiled for constant shapes (torch warns where it runs uncompiled: right, but slow).

    Beyond torch's usual number of shapes it would run uncompiled as well, in memory of the size of a whole mask.
    """
    if not torch.cuda.is_available():
        return flex_attention.flex_attention
    compiled = torch.compile(flex_attention.flex_attention, dynamic=False)

    def attend(*args: Any, **given: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=FLEX_SHAPES):
            return compiled(*args, **given)

    return attend


@cache
def _wants_mass() -> dict[str, Any]:
    """How this torch is asked for the log-sum-exp: the request object came after the flag, which is on its way out."""
    request = getattr(flex_attention, "AuxRequest", None)
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}


@cache
def _capped(softcap: float) -> Any:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


class _Masks:
    """Block masks of one pack by window and device, made when a layer first asks."""

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self.made: dict[tuple[int, torch.device], Any] = {}

    def mask(self, window: int, device: torch.device) -> Any:
        if (window, device) not in self.made:
            self.made[window, device] = block_mask(self.pack, window, device)
        return self.made[window, device]


def block_mask(pack: Pack, window: int, device: torch.device) -> Any:
    """The pack's mask for FlexAttention, its block table worked out from the segments instead of from T² elements."""
    T = len(pack.ids)
    counts, indices = block_table(pack)
    table = pack.segment_table
    of = np.repeat(np.arange(len(table)), table[:, 3])
    fields = np.stack((table[:, 0], table[:, 0] + table[:, 1], table[:, 2]), 1)[of]
    prefix, prefix_end, start = (to_device(column.copy(), device) for column in fields.T)
    position = to_device(pack.positions, device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = ((k >= start[q]) & (k <= q)) | ((k >= prefix[q]) & (k < prefix_end[q]))
        return seen & (position[q] - position[k] < window) if window else seen

    return flex_attention.BlockMask.from_kv_blocks(
        to_device(counts, device)[None, None],
        to_device(indices, device)[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(T, T),
    )


def block_table(pack: Pack) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """For each block of queries: how many key blocks it touches, and which come first (int32 [B], [B, B])."""
    B = -(-len(pack.ids) // FLEX_BLOCK)
    touched = np.zeros((B, B), bool)
    for s in pack.segments:
        rows = slice(s.start // FLEX_BLOCK, -(-(s.start + s.length) // FLEX_BLOCK))
        touched[rows, s.start // FLEX_BLOCK : rows.stop] = True
        if s.prefix_length:
            touched[rows, s.prefix // FLEX_BLOCK : -(-(s.prefix + s.prefix_length) // FLEX_BLOCK)] = True
    touched &= np.tri(B, dtype=bool)
    order = np.argsort(~touched, axis=1, kind="stable")
    return touched.sum(1).astype(np.int32), order.astype(np.int32)
