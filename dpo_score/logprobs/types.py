"""What scoring a sequence gives: its token log-probabilities, or the reason there are none. No torch.

Values stay per token and fp32 here; sums are made elsewhere, in float64 on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dpo_score.storage.cache.blocks import SequenceLogps

__all__ = ["STATS", "Floats", "SequenceLogps", "Unscored", "Values"]
Floats: TypeAlias = NDArray[np.float32]
Values: TypeAlias = Mapping[str, Floats]
"""What a path computes of one sequence: 'logp' and the requested statistics, each fp32 [scored positions]."""

RAISED_BY_MODELS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What a model's code may raise where it is given a pack or a row that it was not written for (NotImplementedError is a
RuntimeError)."""
STATS = ("log_sum_sq_probs", "entropy", "top1")
"""Per scored token, under the model's distribution p at that place: log Σ p² (the length normaliser of WPO,
arXiv 2406.11827), −Σ p log p in nats, and 1.0 where no token is more likely than the sequence's own."""


@dataclass(frozen=True, slots=True)
class Unscored:
    """A sequence without values: its row is rejected with `code`; `reason` is one sentence."""

    code: Literal["nonfinite_logp", "too_large"]
    reason: str
