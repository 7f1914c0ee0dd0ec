"""What training did to both answers, from policy and reference log-probabilities. Pure NumPy.

Δ = log π − log ρ in nats, n scored tokens. Rows with a missing value are left out of the number that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dpo_score.losses.ops import Floats
from dpo_score.metrics.intervals import Clusters, Interval, mean_interval, share_interval

SATURATED = 0.01
DEFINITIONS: Mapping[str, str] = {
    "displaced": "share of pairs whose chosen log-prob fell below the reference, Δc < 0 (arXiv 2410.08847)",
    "both_fell": "share of pairs in which both answers lost probability, Δc < 0 and Δr < 0 (arXiv 2410.08847)",
    "drift_chosen": "mean of Δc/nc: nats per token that chosen answers gained (arXiv 2402.13228)",
    "drift_rejected": "mean of Δr/nr: nats per token that rejected answers gained (arXiv 2402.13228)",
    "pushed_only": "among pairs with a positive margin, the share with Δc ≤ 0: it comes from rejected alone",
    "saturated": f"share of pairs with a DPO weight σ(−margin) below {SATURATED} (arXiv 2305.18290, section 4)",
}
"""One sentence and a source for each number of `training_health`."""


def training_health(
    delta_chosen: Floats,
    delta_rejected: Floats,
    chosen_tokens: Floats,
    rejected_tokens: Floats,
    dpo_weight: Floats,
    clusters: Clusters | None = None,
) -> dict[str, Interval | None]:
    """Every number of DEFINITIONS with its interval; None where no pair has what it needs. Shapes (pairs,)."""
    both = np.isfinite(delta_chosen) & np.isfinite(delta_rejected)
    positive = both & (delta_chosen > delta_rejected)
    fell = delta_chosen < 0.0
    return {
        "displaced": _share(fell, np.isfinite(delta_chosen), clusters),
        "both_fell": _share(fell & (delta_rejected < 0.0), both, clusters),
        "drift_chosen": _mean(delta_chosen / chosen_tokens, clusters),
        "drift_rejected": _mean(delta_rejected / rejected_tokens, clusters),
        "pushed_only": _share(delta_chosen <= 0.0, positive, clusters),
        "saturated": _share(dpo_weight < SATURATED, np.isfinite(dpo_weight), clusters),
    }


def _share(holds: NDArray[np.bool_], among: NDArray[np.bool_], clusters: Clusters | None) -> Interval | None:
    if not among.any():
        return None
    return share_interval(holds[among].astype(np.float64), None if clusters is None else clusters[among])


def _mean(values: Floats, clusters: Clusters | None) -> Interval | None:
    there = np.isfinite(values)
    if not there.any():
        return None
    return mean_interval(values[there], None if clusters is None else clusters[there])
