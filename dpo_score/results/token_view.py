"""Which tokens carry a margin: β·(log π − log ρ) of each scored token. Pure NumPy.

The values of a side add up to its reward (arXiv 2404.12358, eq. 11, without the value terms, which cancel in the
sum), so the differences between the two sides add up to the margin. A single token's value is not a reward by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_score.losses.ops import Floats

LEVELS = 3


def token_shares(policy: Sequence[float], reference: Sequence[float], beta: float) -> Floats:
    """β·(log π − log ρ), one value a scored token. ValueError when the two lists differ in length."""
    if len(policy) != len(reference):
        raise ValueError(f"{len(policy)} policy values but {len(reference)} reference values")
    return beta * (np.asarray(policy, np.float64) - np.asarray(reference, np.float64))


def scale_of(*sides: Floats) -> float:
    """The size at which a colour is full: the 95th percentile of |value| over the sides shown; never 0."""
    sizes = np.abs(np.concatenate([np.zeros(0), *sides]))
    sizes = sizes[np.isfinite(sizes)]
    return max(float(np.quantile(sizes, 0.95)), 1e-9) if len(sizes) else 1e-9


def level(value: float, scale: float) -> int:
    """−LEVELS … LEVELS: the colour of a token; 0 below a sixth of the scale."""
    if not np.isfinite(value):
        return 0
    steps = round(abs(value) / scale * LEVELS)
    return int(np.sign(value)) * min(steps, LEVELS)
