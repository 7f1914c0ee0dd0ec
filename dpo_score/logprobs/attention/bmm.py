"""Shared attention as batched products, for CPUs (and any device without a better kernel).

The grouped query heads of one key head are folded into rows, so each product is one large one; in fp32 it runs on
oneDNN where matmul.py switched that on; in 16 bits the softmax is computed in fp32. Segments are rounded up to a grid:
the added queries are overwritten by the segment they belong to, the added keys lie behind the causal diagonal or are
masked. So few shapes occur, and kernels generated for one pack serve all others.

Shapes: Hq, Hk heads; G = Hq / Hk; T tokens; D, E head sizes; m queries of a block, n keys they may see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dpo_score.logprobs.packing import Pack, Segment

GRID = 16
BLOCK = 128
"""Queries of a block: its scores stay in cache, and little is computed above the diagonal."""
SCORES = 2**22
"""Most scores of a block (16 MB in fp32): what bounds the memory of long rows."""


@dataclass(frozen=True, slots=True, eq=False)
class BmmPack:
    """One pack, ready for `interface.forward`."""

    pack: Pack

    @property
    def tokens(self) -> int:
        return len(self.pack.ids)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float
    ) -> Tensor:
        """query [1, Hq, T, D], key [1, Hk, T, D], value [1, Hk, T, E] → [1, T, Hq, E]."""
        segments = self.pack.segments
        return bmm_attention(query[0], key[0], value[0], segments, scale, window, softcap, sinks)[None]


def bmm_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [Hq, T, D], key [Hk, T, D], value [Hk, T, E], sinks [Hq] → [T, Hq, E]."""
    (Hq, T, D), Hk, E = query.shape, key.shape[0], value.shape[-1]
    G = Hq // Hk
    folded = query.new_zeros(Hk, T + GRID, G, D)
    torch.mul(query.view(Hk, G, T, D).transpose(1, 2), scale, out=folded[:, :T])
    keys, values = _framed(key), _framed(value)
    out = query.new_empty(Hk, T + GRID, G, E)
    rows, result = folded.view(Hk, -1, D), out.view(Hk, -1, E)
    sink_rows = None if sinks is None else sinks.float().view(Hk, 1, G)
    for segment in segments:
        _attend(rows, keys, values, result, segment, G, window, softcap, sink_rows)
    return out[:, :T].transpose(0, 1).reshape(T, Hq, E)


def _framed(states: Tensor) -> Tensor:
    """[H, T, D] with GRID zero tokens before and after: what rounded-up spans may touch."""
    H, T, D = states.shape
    framed = states.new_zeros(H, T + 2 * GRID, D)
    framed[:, GRID : GRID + T] = states
    return framed


def _attend(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    result: Tensor,
    segment: Segment,
    G: int,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    prefix, length = _up(segment.prefix_length), _up(segment.length)
    blank = prefix - segment.prefix_length
    own_keys, own_values = _span(keys, segment, prefix, length), _span(values, segment, prefix, length)
    step = _block(rows.shape[0] * G, prefix + length)
    for begin in range(0, length, step):
        end = min(begin + step, length)
        first, last = _visible(prefix + begin, prefix + end, prefix + length, window)
        at = slice((segment.start + begin) * G, (segment.start + end) * G)
        scores = torch.bmm(rows[:, at], own_keys[:, first:last].transpose(1, 2))
        if softcap:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores[:, :, prefix + end - first :] = -math.inf
        _mask(scores[:, :, : prefix + end - first], prefix + begin - first, end - begin, G, window, blank - first)
        result[:, at] = torch.bmm(_softmax(scores, G, sinks), own_values[:, first:last])


def _span(states: Tensor, segment: Segment, prefix: int, length: int) -> Tensor:
    """Prefix and own tokens of a segment in one run [H, prefix + length, D], the prefix rounded up to the left."""
    own = states[:, GRID + segment.start : GRID + segment.start + length]
    if not prefix:
        return own
    end = GRID + segment.prefix + segment.prefix_length
    return torch.cat((states[:, end - prefix : end], own), dim=1)


def _block(heads: int, keys: int) -> int:
    return max(GRID, min(BLOCK, SCORES // (heads * keys) // GRID * GRID))


def _visible(begin: int, end: int, total: int, window: int) -> tuple[int, int]:
    """Keys [first, last) to multiply for queries at places [begin, end): those they may see, rounded outwards.

    The grid widens with the span (an eighth of it at most): every new shape costs a generated kernel and its memory,
    and a row of 128k tokens would otherwise need thousands.
    """
    first = max(0, begin - window + 1) // GRID * GRID if window else 0
    grid = max(GRID, (1 << (end - first).bit_length()) // 16)
    return first, min(total, first + -(-(end - first) // grid) * grid)


def _mask(scores: Tensor, place: int, m: int, G: int, window: int, blank: int) -> None:
    """In place: query i of the block is at key `place` + i and sees nothing after it, nor before its window."""
    scores[:, :, place:].add_(_triangle(m, G, scores.dtype, scores.device))
    if blank > 0:
        scores[:, :, :blank] = -math.inf
    if window and scores.shape[-1] > window:
        scores.add_(_too_old(place, m, scores.shape[-1], G, window, scores.dtype, scores.device))


@lru_cache(64)
def _triangle(m: int, G: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((m, m), -math.inf, dtype=dtype, device=device).triu(1).repeat_interleave(G, 0)


@lru_cache(64)
def _too_old(place: int, m: int, n: int, G: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    age = torch.arange(place, place + m, device=device)[:, None] - torch.arange(n, device=device)[None]
    return torch.zeros(m, n, dtype=dtype, device=device).masked_fill_(age >= window, -math.inf).repeat_interleave(G, 0)


def _softmax(scores: Tensor, G: int, sinks: Tensor | None) -> Tensor:
    """Probabilities in the dtype of the scores, computed in fp32; a sink is one more logit that attends to nothing."""
    probs = torch.softmax(scores, -1)
    if sinks is not None:
        mass = torch.logsumexp(scores.float(), -1).view(scores.shape[0], -1, G)
        probs.mul_(torch.sigmoid(mass - sinks).view(scores.shape[0], -1, 1))
    return probs


def _up(n: int) -> int:
    return -(-n // GRID) * GRID
