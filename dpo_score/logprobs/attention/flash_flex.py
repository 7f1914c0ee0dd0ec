"""Shared attention on CUDA: torch's own variable-length flash kernel over gathered keys, FlexAttention where that
cannot serve, batched products (attention_cpu) last.

A segment of a pack is one variable-length item whose keys are its prompt and itself: the kernel aligns a causal mask
with the last key, which is exactly the rule of plan.Segment, and sees no mask object. The operator's schema is looked
at before it is called, because it moved between torch versions. Attention sinks enter through the log-sum-exp the
kernel returns. Every choice here is checked on the loaded model by verify.py before it is used.

Shapes: T tokens, S gathered keys; Hq, Hk heads; D, E head sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_score.logprobs.attention.bmm import bmm_attention
from dpo_score.logprobs.packing import BUCKETS, Layout

FLASH_HEAD = 256
"""Largest head size of the flash kernel."""
FLEX_BLOCK = 128
FLEX_SHAPES = 8 * BUCKETS
"""Compiled forms at most: by size of the pack, with and without a window, and of groups larger than a pack."""
NEEDED = ("cum_seq_q", "max_q", "is_causal", "scale", "window_size_left", "window_size_right")
"""Arguments without which the flash operator cannot do what a segment asks."""


@cache
def kernel() -> str:
    """The best kernel this torch offers: `varlen`, `flex` or `bmm`. Part of the numerics of a run."""
    if _flash_arguments() is not None:
        return "varlen"
    return "flex" if torch.cuda.is_available() else "bmm"


@cache
def _flash_arguments() -> frozenset[str] | None:
    """Argument names of torch's flash operator, or None when it is not there or lacks what we need."""
    operator = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if operator is None or not torch.cuda.is_available():
        return None
    names = frozenset(argument.name for argument in operator.default._schema.arguments)
    return names if names.issuperset(NEEDED) else None


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPack:
    """What the kernels need of one pack, made once and used by every layer.

    `key_index` [S]: tokens in the order of the segments' keys; `queries`, `keys`: cumulative lengths, int32.
    """

    layout: Layout
    kernel: str
    key_index: Tensor
    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    flex: Any

    @classmethod
    def of(cls, layout: Layout, device: torch.device, kernel_name: str) -> PreparedPack:
        lengths = np.array([s.length for s in layout.segments], np.int64)
        spans = np.array([s.prefix_length + s.length for s in layout.segments], np.int64)
        return cls(
            layout=layout,
            kernel=kernel_name.split("+")[0],
            key_index=torch.from_numpy(gathered_keys(layout)).to(device, non_blocking=True),
            queries=_cumulative(lengths).to(device, non_blocking=True),
            keys=_cumulative(spans).to(device, non_blocking=True),
            longest=(int(lengths.max(initial=0)), int(spans.max(initial=0))),
            flex=_Masks(layout),
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
    ) -> Tensor:
        """query [1, Hq, T, D], key [1, Hk, T, D], value [1, Hk, T, E] → [1, T, Hq, E]."""
        if query.dtype == torch.float32 or self.kernel == "bmm":
            return bmm_attention(query[0], key[0], value[0], self.layout.segments, scale, window, softcap, sinks)[None]
        if self.kernel == "varlen" and not softcap and query.shape[-1] == value.shape[-1] <= FLASH_HEAD:
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


def gathered_keys(layout: Layout) -> np.ndarray[Any, Any]:
    """Token indices of every segment's keys, one segment after the other: prompt, then the segment itself."""
    spans = [
        part
        for s in layout.segments
        for part in (np.arange(s.prefix, s.prefix + s.prefix_length), np.arange(s.start, s.start + s.length))
    ]
    return np.concatenate([*spans, np.zeros(0, np.int64)]).astype(np.int64)


def _cumulative(lengths: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


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
    from torch.nn.attention.flex_attention import flex_attention

    if not torch.cuda.is_available():
        return flex_attention
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(*args: Any, **given: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=FLEX_SHAPES):
            return compiled(*args, **given)

    return attend


@cache
def _wants_mass() -> dict[str, Any]:
    """How this torch is asked for the log-sum-exp: the request object came after the flag, which is on its way out."""
    from torch.nn.attention import flex_attention

    request = getattr(flex_attention, "AuxRequest", None)
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}


@cache
def _capped(softcap: float) -> Any:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


class _Masks:
    """Block masks of one pack by window and device, made when a layer first asks."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.made: dict[tuple[int, torch.device], Any] = {}

    def mask(self, window: int, device: torch.device) -> Any:
        if (window, device) not in self.made:
            self.made[window, device] = block_mask(self.layout, window, device)
        return self.made[window, device]


def block_mask(layout: Layout, window: int, device: torch.device) -> Any:
    """The pack's mask for FlexAttention, its block table worked out from the segments instead of from T² elements."""
    from torch.nn.attention.flex_attention import BlockMask

    T = len(layout.ids)
    counts, indices = block_table(layout)
    of = np.repeat(np.arange(len(layout.segments)), [s.length for s in layout.segments])
    fields = np.array([(s.prefix, s.prefix + s.prefix_length, s.start) for s in layout.segments], np.int64)[of]
    prefix, prefix_end, start = (torch.from_numpy(column.copy()).to(device) for column in fields.T)
    position = torch.from_numpy(layout.positions).to(device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = ((k >= start[q]) & (k <= q)) | ((k >= prefix[q]) & (k < prefix_end[q]))
        return seen & (position[q] - position[k] < window) if window else seen

    return BlockMask.from_kv_blocks(
        torch.from_numpy(counts).to(device)[None, None],
        torch.from_numpy(indices).to(device)[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=visible,
        seq_lengths=(T, T),
    )


def block_table(layout: Layout) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """For each block of queries: how many key blocks it touches, and which come first (int32 [B], [B, B])."""
    B = -(-len(layout.ids) // FLEX_BLOCK)
    touched = np.zeros((B, B), bool)
    for s in layout.segments:
        rows = slice(s.start // FLEX_BLOCK, -(-(s.start + s.length) // FLEX_BLOCK))
        touched[rows, s.start // FLEX_BLOCK : rows.stop] = True
        if s.prefix_length:
            touched[rows, s.prefix // FLEX_BLOCK : -(-(s.prefix + s.prefix_length) // FLEX_BLOCK)] = True
    touched &= np.tri(B, dtype=bool)
    order = np.argsort(~touched, axis=1, kind="stable")
    return touched.sum(1).astype(np.int32), order.astype(np.int32)
