"""Logits of one chunk of rows to log-probabilities and statistics, in fp32, straight from the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_LOGITS = 2**24
"""Logits in memory at once in fp32 (64 MB): rows per chunk = this over the vocabulary."""


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities along the last axis, in fp32 as logits − logsumexp: on a CPU torch's fused log_softmax is
    off by some 1e-5 nats a token over a large vocabulary, always to one side, so sums drift."""
    if logits.dtype != torch.float32:
        return torch.log_softmax(logits, dim=-1)
    return logits - torch.logsumexp(logits, dim=-1, keepdim=True)


def read_logits(logits_NV: Tensor, target_N: Tensor, stats: Sequence[str]) -> dict[str, Tensor]:
    """log p of each target (fp32 [N]) and the statistics of `types.STATS`, from fp32 logits."""
    logp_NV = log_softmax(logits_NV)
    values = {"logp": logp_NV.gather(1, target_N[:, None])[:, 0]}
    if "log_sum_sq_probs" in stats:
        values["log_sum_sq_probs"] = torch.logsumexp(2 * logp_NV, dim=-1)
    if "entropy" in stats:
        values["entropy"] = torch.special.entr(logp_NV.exp()).sum(-1)
    if "top1" in stats:
        values["top1"] = (values["logp"] >= logp_NV.amax(-1)).float()
    return values
