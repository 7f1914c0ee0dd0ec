"""Scored rows made from numbers, without a run: what comparisons, audits and reports are tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_score.losses.ops import log_sigmoid, sigmoid
from dpo_score.metrics.arrays import collect
from dpo_score.metrics.compare import ScoredPolicy, ScoringSettings

SETTINGS = ScoringSettings("reference", 0.1, "sigmoid", "keep_start, max_length 512", "template", "float32", True)


def scored(
    name: str,
    nats: Sequence[float],
    *,
    pair_ids: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    subsets: Sequence[str | None] | None = None,
    step: int | None = None,
    settings: ScoringSettings = SETTINGS,
    marks: Sequence[Sequence[str]] | None = None,
    lengths: Sequence[tuple[int, int]] | None = None,
    slices: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> ScoredPolicy:
    """A policy whose pairs have these margins in nats, all of them from the chosen side; `slices`: further columns."""
    n = len(nats)
    margins = settings.beta * np.asarray(nats, np.float64)
    zeros = np.zeros(n)
    chosen_tokens, rejected_tokens = zip(*(lengths or [(10 + i % 7, 12) for i in range(n)]), strict=True)
    with np.errstate(invalid="ignore"):  # a missing margin is NaN
        weight, loss = sigmoid(-margins), -log_sigmoid(margins)
    table = pa.table(
        {
            "dataset": ["d"] * n,
            "subset": pa.array(subsets or [None] * n, pa.string()),
            "prompt_digest": list(prompts or [f"prompt {i}" for i in range(n)]),
            "policy_chosen_logps": np.asarray(nats, np.float64) - 50.0,
            "policy_rejected_logps": zeros - 52.0,
            "ref_chosen_logps": zeros - 50.0,
            "ref_rejected_logps": zeros - 52.0,
            "chosen_tokens": pa.array(chosen_tokens, pa.int32()),
            "rejected_tokens": pa.array(rejected_tokens, pa.int32()),
            "chosen_rewards": margins,
            "rejected_rewards": zeros,
            "margins_nats": np.asarray(nats, np.float64),
            "dpo_weight": weight,
            "loss": loss,
            **slices,
        }
    )
    ids = list(pair_ids or [f"pair {i}" for i in range(n)])
    return ScoredPolicy(
        name,
        step,
        [f"0:{i}" for i in range(n)],
        ids,
        collect([table], slices=list(slices)),
        marks or [()] * n,
        settings,
    )


def policies(seed: int, pairs: int, gains: dict[str, float], subsets: int = 3) -> list[ScoredPolicy]:
    """Policies over the same pairs whose margins share a difficulty; a gain of 0.5 moves accuracy by some 15 points."""
    draw = np.random.default_rng(seed)
    difficulty = draw.normal(size=pairs)
    names = [f"subset {i % subsets}" for i in range(pairs)]
    return [
        scored(name, 10 * (gain + difficulty + 0.5 * draw.normal(size=pairs)), subsets=names, step=10 * (index + 1))
        for index, (name, gain) in enumerate(gains.items())
    ]
