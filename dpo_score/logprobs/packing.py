"""Which sequences share a pack, and where every token of it is. Pure: numpy in, numpy out.

A pack is one row of tokens `[prompt | response | response …][prompt | response …]…`. It holds each prompt once for
all its responses, and each distinct response once; positions start again at the prompt's length for every response.
The last token of a response is no input: it is predicted, and predicts nothing. An empty prompt is not shared. The
plan depends on the sequences and the budget alone, never on a device or the clock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpo_score.data.types import TokenSequence

Index = NDArray[np.int64]
PAD = 64
BUCKETS = 16
"""Sizes that packs are padded to on a GPU: few shapes need few kernels."""


class Segment(NamedTuple):
    """Queries: tokens [start, start + length). Keys: tokens [prefix, prefix + prefix_length), then the queries' own.

    Attention is causal in that order: the i-th query sees the whole prefix and the first i + 1 of its own tokens.
    """

    prefix: int
    prefix_length: int
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class Pack:
    """`ids`, `positions`: int64 [T]. `segment_table`: int64 [S, 4], the fields of S segments in order.

    `rows` [N]: tokens whose hidden state the head needs, ascending, each once. Scored token j (sequences in order,
    `counts[i]` of them for sequence i) is `targets[j]`, predicted from row `rows[sources[j]]`.
    """

    ids: Index
    positions: Index
    segment_table: Index
    rows: Index
    sources: Index
    targets: Index
    counts: tuple[int, ...]

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(map(Segment._make, self.segment_table.tolist()))


def plan(sequences: Sequence[TokenSequence], budget: int) -> list[tuple[int, ...]]:
    """Packs as indices of `sequences`, every index once. No pack holds more than max(budget, its only group) tokens."""
    groups = prompt_groups(sequences)
    sizes = [group_size([sequences[i] for i in group]) for group in groups]
    return [tuple(i for g in sorted(pack) for i in groups[g]) for pack in fill(sizes, budget)]


def prompt_groups(sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
    """Indices by equal prompt (ids and pictures), in order of first appearance; an empty prompt makes its own group."""
    groups: dict[Any, list[int]] = {}
    for index, sequence in enumerate(sequences):
        key = sequence.prompt_key or index
        groups.setdefault(key, []).append(index)
    return [tuple(group) for group in groups.values()]


def group_size(group: Sequence[TokenSequence]) -> int:
    """Tokens of one group in a pack: the prompt, and each distinct response without its last token, once."""
    return len(group[0].prompt) + sum({_bytes(ids): len(ids) for ids in map(response_inputs, group)}.values())


def response_inputs(sequence: TokenSequence) -> NDArray[np.int32]:
    """The tokens of the response that something is predicted from."""
    return sequence.response[:-1]


def pack_size(sequences: Sequence[TokenSequence]) -> int:
    """Tokens of a pack."""
    return sum(group_size([sequences[i] for i in group]) for group in prompt_groups(sequences))


def bucket(tokens: int, budget: int) -> int:
    """The size to pad a pack to: the next of BUCKETS equal steps to the budget; above the budget its own.

    All packs of a block but the last are full and make the whole budget; the last, and what is left of a pack that did
    not fit on its device, cost what they hold.
    """
    step = max(budget // BUCKETS, PAD)
    return max(tokens, min(-(-tokens // step) * step, budget))


def fill(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of items within the budget (an item above it has its own); the fewer of best-fit and first-fit decreasing.

    Best fit leaves fuller bins; first fit, which now and then needs one bin less, is the classical bound
    (11/9 of the optimum; Johnson et al. 1974).
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    best, first = _best_fit(order, sizes, budget), _first_fit(order, sizes, budget)
    return best if len(best) <= len(first) else first


def _best_fit(order: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for item in order:
        at = bisect_left(room, (sizes[item], -1))
        if at == len(room):
            bins.append([item])
            insort(room, (budget - sizes[item], len(bins) - 1))
        else:
            left, chosen = room.pop(at)
            bins[chosen].append(item)
            insort(room, (left - sizes[item], chosen))
    return bins


def _first_fit(order: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room = np.zeros(len(order), np.int64)
    for item in order:
        fits = np.flatnonzero(room[: len(bins)] >= sizes[item])
        chosen = int(fits[0]) if len(fits) else len(bins)
        if chosen == len(bins):
            bins.append([])
            room[chosen] = budget
        bins[chosen].append(item)
        room[chosen] -= sizes[item]
    return bins


def lay_out(sequences: Sequence[TokenSequence], pad_to: int = 0, longest_row: int = 0) -> Pack:
    """The tokens of one pack, and which of them predict what.

    `pad_to`: tokens of padding follow up to this size, in segments of their own that predict nothing. `longest_row`:
    one token of padding gets the last position of a row of this length, for models whose forward asks how long its
    longest row is (the last token of a row is no input, so its position would be missing).
    """
    parts, starts, table, prompt_at, response_at = _written(sequences)
    size = sum(map(len, parts))
    table, padding = _with_padding(table, size, pad_to, longest_row)
    positions = np.arange(size) - np.repeat(starts, [len(part) for part in parts]) if size else np.zeros(0, np.int64)

    scored = [s.scored_positions for s in sequences]
    counts = np.array([len(p) for p in scored], np.int64)
    position = np.concatenate([*scored, np.zeros(0, np.int64)]).astype(np.int64)
    of = np.repeat(np.arange(len(sequences)), counts)
    prompts = np.array([len(s.prompt) for s in sequences], np.int64)
    before = position - 1
    predictor = np.where(before < prompts[of], prompt_at[of] + before, response_at[of] + before - prompts[of])
    needed = np.zeros(size, bool)
    needed[predictor] = True
    whole = np.concatenate([np.zeros(0, np.int32), *chain.from_iterable((s.prompt, s.response) for s in sequences)])
    lengths = np.array([len(s.prompt) + len(s.response) for s in sequences], np.int64)
    begin = np.cumsum(lengths) - lengths
    return Pack(
        ids=np.concatenate([np.zeros(0, np.int64), *parts, np.zeros(len(padding), np.int64)]).astype(np.int64),
        positions=np.concatenate([positions, padding]).astype(np.int64),
        segment_table=table,
        rows=np.flatnonzero(needed),
        sources=(np.cumsum(needed) - 1)[predictor] if len(predictor) else predictor,
        targets=whole[begin[of] + position].astype(np.int64),
        counts=tuple(counts.tolist()),
    )


def _written(sequences: Sequence[TokenSequence]) -> tuple[list[NDArray[Any]], list[int], Index, Index, Index]:
    """The pack from left to right: parts (a prompt or a response), where position 0 of each part is, segments; and
    for every sequence where its prompt and its response begin."""
    parts: list[NDArray[Any]] = []
    starts: list[int] = []
    table: list[tuple[int, int, int, int]] = []
    prompt_at, response_at = np.zeros(len(sequences), np.int64), np.zeros(len(sequences), np.int64)
    size = 0
    for group in prompt_groups(sequences):
        prompt, begin = sequences[group[0]].prompt, size
        parts.append(prompt)
        starts.append(begin)
        size += len(prompt)
        found: dict[bytes, int] = {}
        for index in group:
            response = response_inputs(sequences[index])
            key = _bytes(response)
            if key not in found:
                first = not found
                found[key] = size
                parts.append(response)
                starts.append(size - len(prompt))
                table.append(
                    (begin, 0, begin, len(prompt) + len(response))
                    if first
                    else (begin, len(prompt), size, len(response))
                )
                size += len(response)
            prompt_at[index], response_at[index] = begin, found[key]
    segments = np.array(table, np.int64).reshape(-1, 4)
    return parts, starts, segments[segments[:, 3] > 0], prompt_at, response_at


def _with_padding(table: Index, size: int, pad_to: int, longest_row: int) -> tuple[Index, Index]:
    """Segments with those of padding, and the positions of the padding: short runs from 0 on, which cost next to
    nothing and are beyond no model."""
    lone = 1 if longest_row else 0
    starts = np.arange(size + lone, max(pad_to, size + lone), PAD, dtype=np.int64)
    lengths = np.minimum(PAD, max(pad_to, size + lone) - starts)
    positions = np.arange(lengths.sum()) % PAD
    if lone:
        starts, lengths = np.append(size, starts), np.append(1, lengths)
        positions = np.append(longest_row - 1, positions)
    added = np.stack((starts, np.zeros_like(starts), starts, lengths), 1)
    return np.concatenate((table, added)), positions.astype(np.int64)


def _bytes(ids: NDArray[Any]) -> bytes:
    return ids.astype(np.int32, copy=False).tobytes()
