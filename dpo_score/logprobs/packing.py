"""Which sequences share a pack, and where every token stands in it. Pure: numpy in, numpy out.

A pack is one row of tokens `[prompt | response | response …][prompt | response …]…`. Each prompt stands once for
all its responses, each distinct response once; positions start again at the prompt's length for every response. The
last token of a response is no input: it is predicted, and predicts nothing. An empty prompt is not shared. The plan
depends on the sequences and the budget alone, never on a device or the clock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_score.data.types import TokenSequence

Index = NDArray[np.int64]
PAD = 64
BUCKETS = 16
"""Sizes that packs are padded to, where they are: a device that sees few shapes meets few kernels."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries: tokens [start, start + length). Keys: tokens [prefix, prefix + prefix_length), then the queries' own.

    Attention is causal in that order: the i-th query sees the whole prefix and the first i + 1 of its own tokens.
    """

    prefix: int
    prefix_length: int
    start: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """One pack. `ids`, `positions`: int64 [T]. `rows` [N]: tokens whose hidden state the head needs, each once.

    Scored token j (sequences in order, `counts[i]` of them for sequence i) is `targets[j]`, predicted from row
    `rows[sources[j]]`.
    """

    ids: Index
    positions: Index
    segments: tuple[Segment, ...]
    rows: Index
    sources: Index
    targets: Index
    counts: tuple[int, ...]


def plan(sequences: Sequence[TokenSequence], budget: int) -> list[tuple[int, ...]]:
    """Packs as indices of `sequences`, every index once. No pack holds more than max(budget, its only group) tokens."""
    groups = prompt_groups(sequences)
    sizes = [group_size([sequences[i] for i in group]) for group in groups]
    return [tuple(i for g in sorted(pack) for i in groups[g]) for pack in fill(sizes, budget)]


def prompt_groups(sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
    """Indices by equal prompt, in order of first appearance; an empty prompt makes a group of its own."""
    groups: dict[Any, list[int]] = {}
    for index, sequence in enumerate(sequences):
        key = sequence.prompt.astype(np.int32, copy=False).tobytes() or index
        groups.setdefault(key, []).append(index)
    return [tuple(group) for group in groups.values()]


def group_size(group: Sequence[TokenSequence]) -> int:
    """Tokens of one group in a pack: the prompt, and each distinct response without its last token, once."""
    return len(group[0].prompt) + sum({_bytes(s): len(response_inputs(s)) for s in group}.values())


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
    """Bins of items within the budget (an item above it stands alone); the fewer of best-fit and first-fit decreasing.

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


def lay_out(sequences: Sequence[TokenSequence], pad_to: int = 0) -> Layout:
    """The tokens of one pack, and which of them predict what. Padding, if asked, is a segment nobody reads."""
    tokens = _Tokens()
    where: dict[int, tuple[int, int]] = {}
    for group in prompt_groups(sequences):
        tokens.add_group([sequences[i] for i in group], group, where)
    tokens.add_padding(pad_to)
    predictors = [_predictors(s, *where[i]) for i, s in enumerate(sequences)]
    counts = tuple(len(p) for p in predictors)
    rows, sources = np.unique(np.concatenate([*predictors, np.zeros(0, np.int64)]), return_inverse=True)
    return Layout(
        ids=np.concatenate([*tokens.ids, np.zeros(0, np.int64)]).astype(np.int64),
        positions=np.concatenate([*tokens.positions, np.zeros(0, np.int64)]).astype(np.int64),
        segments=tuple(tokens.segments),
        rows=rows.astype(np.int64),
        sources=sources.astype(np.int64).reshape(-1),
        targets=np.concatenate([*(_targets(s) for s in sequences), np.zeros(0, np.int64)]).astype(np.int64),
        counts=counts,
    )


class _Tokens:
    """A pack being written from left to right."""

    def __init__(self) -> None:
        self.ids: list[NDArray[Any]] = []
        self.positions: list[NDArray[Any]] = []
        self.segments: list[Segment] = []
        self.length = 0

    def add_group(
        self, group: Sequence[TokenSequence], indices: Sequence[int], where: dict[int, tuple[int, int]]
    ) -> None:
        """Write prompt and distinct responses; `where[index]` becomes (start of prompt, start of response)."""
        prompt, begin = group[0].prompt, self.length
        starts: dict[bytes, int] = {}
        for index, sequence in zip(indices, group, strict=True):
            response = _bytes(sequence)
            if response not in starts:
                first = not starts
                starts[response] = self._write(prompt, response_inputs(sequence), begin, first)
            where[index] = begin, starts[response]

    def _write(self, prompt: NDArray[Any], response: NDArray[Any], begin: int, first: bool) -> int:
        start = self.length + (len(prompt) if first else 0)
        written = (prompt, response) if first else (response,)
        total = sum(len(part) for part in written)
        self.ids.extend(written)
        self.positions.append(np.arange(len(prompt) + len(response))[-total:] if total else np.zeros(0, np.int64))
        if total:
            self.segments.append(Segment(begin, 0 if first else len(prompt), self.length, total))
        self.length += total
        return start

    def add_padding(self, pad_to: int) -> None:
        """Short segments of token 0, so that they cost next to nothing and no position is beyond any model."""
        for start in range(self.length, pad_to, PAD):
            length = min(PAD, pad_to - start)
            self.ids.append(np.zeros(length, np.int64))
            self.positions.append(np.arange(length))
            self.segments.append(Segment(start, 0, start, length))
        self.length = max(self.length, pad_to)


def _predictors(sequence: TokenSequence, prompt_start: int, response_start: int) -> Index:
    """The pack's token before each scored one: in the prompt, or in the response, or the prompt's last."""
    before = sequence.scored_positions - 1
    in_response = before - len(sequence.prompt)
    return np.where(in_response < 0, prompt_start + before, response_start + in_response)


def _targets(sequence: TokenSequence) -> NDArray[Any]:
    return np.concatenate([sequence.prompt, sequence.response])[sequence.scored_positions]


def _bytes(sequence: TokenSequence) -> bytes:
    return response_inputs(sequence).astype(np.int32, copy=False).tobytes()
