"""Small things the engine's tests share: numerics of a tiny model, and a look at results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dpo_score.config.schema import ComputeSpec
from dpo_score.logprobs.numerics import resolve_numerics
from dpo_score.models.numerics import Numerics


def numerics_for(model, path, **changes) -> Numerics:
    """One thread, packs of 64 tokens unless said otherwise."""
    numerics = resolve_numerics(ComputeSpec(path=path, threads=1, device="cpu"), model.config.to_dict(), None)
    return replace(numerics, **{"batch_tokens": 64, **changes})


def sums(results):
    return np.array([r.token_logps.sum(dtype=np.float64) for r in results])
