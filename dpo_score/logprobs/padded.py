"""The plain path: right-padded batches, the whole sequence each time, fp32 log-softmax over chunks of rows.

Slow, simple, and the one that the fast path is checked against. A padded token comes after every real one, so a
causal model never sees it, nor does the state of a recurrent one before its last real token. Sequences are ordered by
length, so little is padded. Rows that may not share a forward (lengths.py) are in batches of their own, and where a
model was found to treat a row otherwise beside others (self_check.py), every row has its own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.lengths import fresh_rope, length_rules, row_length
from dpo_score.logprobs.lm_head import CHUNK_LOGITS, read_logits, token_values
from dpo_score.logprobs.transfer import split, to_device
from dpo_score.logprobs.types import Values
from dpo_score.models.numerics import Kernel, Numerics
from dpo_score.models.parts import ModelParts


class PaddedPath:
    """Scores sequences one padded batch at a time with a model as it was loaded.

    With Kernel.MODEL_OWN_SOFTMAX the log-softmax runs in the dtype of the model's own logits, as RewardBench's does,
    not in fp32.
    """

    def __init__(self, parts: ModelParts, numerics: Numerics, stats: Sequence[str] = ()) -> None:
        self.parts = parts
        self.numerics = numerics
        self.stats = tuple(stats)
        self.own_softmax = numerics.kernel == Kernel.MODEL_OWN_SOFTMAX
        self.rules = length_rules(parts.model.config.to_dict())
        self.forwards = 0

    def plan(self, sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
        """Indices of `sequences` by batch: longest first, padded size within the budget."""
        if self.numerics.one_row:
            return [(i,) for i in range(len(sequences))]
        batches = []
        for some in self.rules.apart(sequences):
            lengths = [row_length(sequences[i]) for i in some]
            batches += [tuple(some[i] for i in batch) for batch in microbatches(lengths, self.numerics.batch_tokens)]
        return batches

    @contextmanager
    def session(self) -> Iterator[None]:
        """Nothing to prepare: the model runs as it was loaded."""
        yield

    def compute(self, sequences: Sequence[TokenSequence]) -> list[Values]:
        """One batch: the values of every sequence, in order."""
        out = self.parts.out_device
        rows = [np.concatenate([s.prompt, s.response]) for s in sequences]
        positions = [s.scored_positions for s in sequences]
        counts = [len(p) for p in positions]
        row_N = to_device(np.repeat(np.arange(len(rows)), counts), out)
        place_N = to_device(np.concatenate(positions) - 1, out)
        targets = np.concatenate([ids[p] for ids, p in zip(rows, positions, strict=True)]).astype(np.int64)
        inputs = pad(rows, self.parts.device)
        self.forwards += 1
        if self.rules:
            fresh_rope(self.parts.model)
        with torch.inference_mode():
            values = self._values(inputs, row_N, place_N, to_device(targets, out))
        return split(values, counts)

    def _values(self, inputs: dict[str, Tensor], row_N: Tensor, place_N: Tensor, target_N: Tensor) -> dict[str, Tensor]:
        head = self.parts.head
        ids_BT = inputs.pop("ids")
        if head is None or self.own_softmax:
            logits_BTV = self.parts.model(input_ids=ids_BT, use_cache=False, **inputs).logits
            dtype = logits_BTV.dtype if self.own_softmax else torch.float32
            chunks = (logits_BTV[row_N[c], place_N[c]].to(dtype) for c in _chunks(len(row_N), logits_BTV.shape[-1]))
            return _concatenated(chunks, target_N, self.stats)
        hidden_NH = self.parts.hidden(ids_BT, **inputs)[row_N, place_N]
        if head.group is not None:  # ranks that share a vocabulary have no whole logits to take a softmax of
            return token_values(head, hidden_NH, np.arange(len(row_N)), target_N, self.stats)
        chunks = (head.logits(hidden_NH[c]) for c in _chunks(len(row_N), head.vocabulary))
        return _concatenated(chunks, target_N, self.stats)


def microbatches(lengths: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    """Longest first; a batch holds rows × longest ≤ budget tokens (or one row), little of it padding."""
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = (len(batches[-1]) + 1) * lengths[batches[-1][0]] if batches else 0
        if batches and is_worth_it(size, tokens + lengths[index], budget):
            batches[-1].append(index)
            tokens += lengths[index]
        else:
            batches.append([index])
            tokens = lengths[index]
    return [tuple(batch) for batch in batches]


def is_worth_it(size: int, tokens: int, budget: int) -> bool:
    """Whether a batch of `size` tokens, of which `tokens` are real, is better than two: in a small forward the calls
    cost more than the padding, in a large one padding costs what tokens do."""
    return size <= budget and (size <= SMALL_FORWARD or size - tokens <= size * PADDING)


SMALL_FORWARD = 1024
"""Tokens of a forward whose padding is cheaper than another forward."""
PADDING = 0.125
"""Largest share of padding in a forward that is not small."""


def pad(rows: Sequence[np.ndarray[Any, Any]], device: torch.device) -> dict[str, Tensor]:
    """`ids` [B, T] padded on the right with 0, and `attention_mask` where there is any padding.

    Without padding no mask is made, so that attention needs no T × T memory.
    """
    lengths = np.array([len(r) for r in rows])
    ids = np.zeros((len(rows), max(int(lengths.max()), 1)), np.int64)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = row
    inputs = {"ids": torch.from_numpy(ids).to(device)}
    if (lengths < ids.shape[1]).any():
        mask = (np.arange(ids.shape[1])[None] < lengths[:, None]).astype(np.int64)
        inputs["attention_mask"] = torch.from_numpy(mask).to(device)
    return inputs


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(1, CHUNK_LOGITS // vocabulary)
    return [slice(start, start + step) for start in range(0, max(rows, 1), step)]


def _concatenated(chunks: Any, target_N: Tensor, stats: Sequence[str]) -> dict[str, Tensor]:
    done, start = [], 0
    for logits_NV in chunks:
        done.append(read_logits(logits_NV, target_N[start : start + len(logits_NV)], stats))
        start += len(logits_NV)
    return {name: torch.cat([values[name] for values in done]) for name in done[0]}
