"""Shared attention on the CPU through torch's own fused kernel, a segment at a time.

`scaled_dot_product_attention` keeps scores in cache, computes softmax in fp32, reads grouped heads and strided states
as they are: half the time of separate products in 16 bits. In fp32 its products are MKL's, so where oneDNN is faster
(matmul.py) bmm.py serves. Causality and windows depend on how far a key is behind its query and on nothing
else, so one mask per size serves every segment as a slice.

Shapes: Hq, Hk heads; T tokens; D head size; m queries of a block, n keys they may see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dpo_score.logprobs.attention.bmm import bmm_attention
from dpo_score.logprobs.packing import Pack, Segment

MASK = 2**21
"""Most elements of a block's mask (4 MB in 16 bits): what bounds the memory of long rows."""
LEAST_QUERIES, LEAST_KEYS = 256, 1024
"""Masks are made in powers of two from here on, so that few are kept."""


@dataclass(frozen=True, slots=True, eq=False)
class CpuPack:
    """One pack, ready for `interface.forward`. Caps, sinks and unequal head sizes go to the batched products."""

    pack: Pack

    @property
    def tokens(self) -> int:
        return len(self.pack.ids)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
    ) -> Tensor:
        """query [1, Hq, T, D], key [1, Hk, T, D], value [1, Hk, T, E] → [1, T, Hq, E]."""
        segments = self.pack.segments
        if softcap or sinks is not None or query.shape[-1] != value.shape[-1]:
            return bmm_attention(query[0], key[0], value[0], segments, scale, window, softcap, sinks)[None]
        return sdpa_attention(query, key, value, segments, scale, window)


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], scale: float, window: int = 0
) -> Tensor:
    """query [1, Hq, T, D], key and value [1, Hk, T, D] → [1, T, Hq, D]."""
    _, Hq, T, D = query.shape
    out = query.new_empty(1, T, Hq, D)
    grouped = Hq != key.shape[1]
    for segment in segments:
        keys, values = _visible(key, segment), _visible(value, segment)
        for begin, end, first in _blocks(segment, window):
            last = segment.prefix_length + end
            mask = _mask(end - begin, first, last, window, query) if _masked(segment, begin, window) else None
            rows = slice(segment.start + begin, segment.start + end)
            found = scaled_dot_product_attention(
                query[:, :, rows],
                keys[:, :, first:last],
                values[:, :, first:last],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=grouped,
            )
            out[:, rows] = found.transpose(1, 2)
    return out


def _visible(states: Tensor, segment: Segment) -> Tensor:
    """Prefix and own tokens of a segment [1, H, prefix + length, D]."""
    own = states[:, :, segment.start : segment.start + segment.length]
    if not segment.prefix_length:
        return own
    prefix = states[:, :, segment.prefix : segment.prefix + segment.prefix_length]
    return torch.cat((prefix, own), dim=2)


def _masked(segment: Segment, begin: int, window: int) -> bool:
    """Whether a block needs a mask, or is the plain causal square that the kernel knows."""
    return bool(segment.prefix_length or begin or (window and segment.length > window))


def _blocks(segment: Segment, window: int) -> Iterator[tuple[int, int, int]]:
    """Queries [begin, end) of a segment and the first key they may see; whole where no mask would be large."""
    total = segment.prefix_length + segment.length
    step = segment.length
    if _masked(segment, 0, window):
        step = max(LEAST_QUERIES // 2, MASK // total)
    for begin in range(0, segment.length, step):
        end = min(begin + step, segment.length)
        yield begin, end, max(0, segment.prefix_length + begin - window + 1) if window else 0


def _mask(m: int, first: int, last: int, window: int, like: Tensor) -> Tensor:
    """0 or −∞ [m, last − first]: the i-th of m queries has the place of key last − m + i."""
    before = last - first - m
    rows = max(LEAST_QUERIES, _power(m))
    whole = _staircase(rows, max(LEAST_KEYS, _power(before)), window, like.dtype)
    begin = whole.shape[1] - rows - before
    return whole[:m, begin : begin + before + m]


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(4)
def _staircase(rows: int, before: int, window: int, dtype: torch.dtype) -> Tensor:
    """0 or −∞ [rows, before + rows]: query i has the place of key before + i and sees `window` keys (0: all)."""
    whole = torch.full((rows, before + rows), -math.inf, dtype=dtype).triu_(before + 1)
    if window:
        whole += torch.full_like(whole, -math.inf).tril_(before - window)
    return whole
