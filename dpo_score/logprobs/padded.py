"""The plain path: right-padded microbatches, the whole sequence each time, fp32 log-softmax over chunks of rows.

Slow, simple, right for every decoder: the fast path is checked against it. A padded token stands behind every real
one, so a causal model never sees it; recurrent models are given rows of one length instead. Sequences are
ordered by length, so little is padded; nothing here depends on what shares a microbatch except the last bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.types import Floats
from dpo_score.models.parts import ModelParts

CHUNK_LOGITS = 2**24
"""Logits held at once in fp32 (64 MB): rows per chunk = this over the vocabulary."""
Values = Mapping[str, Floats]
"""'logp' and the requested statistics, each fp32 [scored positions]."""


class PlainPath:
    """Scores sequences one microbatch at a time with a model as it was loaded.

    `own_softmax`: the log-softmax runs in the dtype of the model's own logits, as RewardBench's does, not in fp32.
    """

    def __init__(
        self, anatomy: ModelParts, batch_tokens: int, stats: Sequence[str] = (), own_softmax: bool = False
    ) -> None:
        self.anatomy = anatomy
        self.batch_tokens = batch_tokens
        self.stats = tuple(stats)
        self.own_softmax = own_softmax
        self.forwards = 0

    def plan(self, sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
        """Indices of `sequences` by microbatch: longest first, padded size within the budget."""
        lengths = [len(s.prompt) + len(s.response) for s in sequences]
        return microbatches(lengths, self.batch_tokens, one_length=self.anatomy.stateful)

    def compute(self, sequences: Sequence[TokenSequence]) -> list[Values]:
        """One microbatch: the values of every sequence, in order."""
        rows = [np.concatenate([s.prompt, s.response]) for s in sequences]
        positions = [s.scored_positions for s in sequences]
        counts = [len(p) for p in positions]
        row_N = torch.from_numpy(np.repeat(np.arange(len(rows)), counts)).to(self.anatomy.out_device)
        place_N = torch.from_numpy(np.concatenate(positions) - 1).to(self.anatomy.out_device)
        targets = np.concatenate([ids[p] for ids, p in zip(rows, positions, strict=True)]).astype(np.int64)
        target_N = torch.from_numpy(targets).to(self.anatomy.out_device)
        inputs = pad(rows, self.anatomy.device)
        self.forwards += 1
        with torch.inference_mode():
            values = self._values(inputs, row_N, place_N, target_N)
        return split(values, counts)

    def _values(self, inputs: dict[str, Tensor], row_N: Tensor, place_N: Tensor, target_N: Tensor) -> dict[str, Tensor]:
        head = self.anatomy.head
        ids_BT = inputs.pop("ids")
        if head is None or self.own_softmax:
            logits_BTV = self.anatomy.model(input_ids=ids_BT, use_cache=False, **inputs).logits
            dtype = logits_BTV.dtype if self.own_softmax else torch.float32
            chunks = (logits_BTV[row_N[c], place_N[c]].to(dtype) for c in _chunks(len(row_N), logits_BTV.shape[-1]))
            return _concatenated(chunks, target_N, self.stats)
        hidden_NH = self.anatomy.hidden(ids_BT, **inputs)[row_N, place_N]
        if head.group is not None:  # ranks that share a vocabulary have no whole logits to take a softmax of
            from dpo_score.logprobs.lm_head import token_values

            return token_values(head, hidden_NH, torch.arange(len(row_N), device=row_N.device), target_N, self.stats)
        chunks = (head.logits(hidden_NH[c]) for c in _chunks(len(row_N), head.vocabulary))
        return _concatenated(chunks, target_N, self.stats)


def microbatches(lengths: Sequence[int], budget: int, one_length: bool = False) -> list[tuple[int, ...]]:
    """Longest first; a batch holds rows × longest ≤ budget tokens (or one row), of a single length if asked."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        fits = bool(batches) and (len(batches[-1]) + 1) * longest <= budget
        if fits and (lengths[index] == longest or not one_length):
            batches[-1].append(index)
        else:
            batches.append([index])
    return [tuple(batch) for batch in batches]


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


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities along the last axis, in fp32 as logits − logsumexp: on a CPU torch's fused log_softmax is
    off by some 1e-5 nats a token over a large vocabulary, always to one side, so sums drift."""
    if logits.dtype != torch.float32:
        return torch.log_softmax(logits, dim=-1)
    return logits - torch.logsumexp(logits, dim=-1, keepdim=True)


def read_logits(logits_NV: Tensor, target_N: Tensor, stats: Sequence[str]) -> dict[str, Tensor]:
    """log p of each target (fp32 [N]) and the statistics of `results.STATS`, from fp32 logits."""
    logp_NV = log_softmax(logits_NV)
    values = {"logp": logp_NV.gather(1, target_N[:, None])[:, 0]}
    if "log_sum_sq_probs" in stats:
        values["log_sum_sq_probs"] = torch.logsumexp(2 * logp_NV, dim=-1)
    if "entropy" in stats:
        values["entropy"] = torch.special.entr(logp_NV.exp()).sum(-1)
    if "top1" in stats:
        values["top1"] = (values["logp"] >= logp_NV.amax(-1)).float()
    return values


def split(values: Mapping[str, Tensor], counts: Sequence[int]) -> list[Values]:
    """Values of a batch, brought to the host and cut by sequence."""
    cuts = np.cumsum(counts)[:-1]
    parts = {name: np.split(tensor.float().cpu().numpy(), cuts) for name, tensor in values.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(counts))]


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(1, CHUNK_LOGITS // vocabulary)
    return [slice(start, start + step) for start in range(0, max(rows, 1), step)]


def _concatenated(chunks: Any, target_N: Tensor, stats: Sequence[str]) -> dict[str, Tensor]:
    done, start = [], 0
    for logits_NV in chunks:
        done.append(read_logits(logits_NV, target_N[start : start + len(logits_NV)], stats))
        start += len(logits_NV)
    return {name: torch.cat([values[name] for values in done]) for name in done[0]}
