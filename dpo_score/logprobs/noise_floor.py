"""How far the numbers of a run are from fp32 on the plain path: the noise floor under every margin it reports.

A sample of sequences is scored again, plainly, in fp32 (a 16-bit model widened layer by layer). Sums are float64 on
the host. A policy − reference margin carries the noise of both models; `deltas` lets a caller combine them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_score.data.types import TokenSequence
from dpo_score.logprobs.scorer import make_path
from dpo_score.logprobs.torch_settings import running
from dpo_score.logprobs.types import SequenceLogps, Unscored
from dpo_score.logprobs.upcast import CannotWiden, widened
from dpo_score.models import memory
from dpo_score.models.numerics import Numerics
from dpo_score.tokenization.pictures import PictureInputs


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """|Δ| in nats over a sample: of sequence log-probabilities, and of differences chosen − rejected.

    `deltas`: the run's value − fp32, of the sequences of the sample with the indices `measured`. Where it could not be
    measured all numbers are None and `reason` says why.
    """

    sequences: int
    logp_mean: float | None = None
    logp_max: float | None = None
    margin_mean: float | None = None
    margin_max: float | None = None
    deltas: tuple[float, ...] = ()
    measured: tuple[int, ...] = ()
    reason: str | None = None


def noise_floor(
    model: Any,
    numerics: Numerics,
    sequences: Sequence[TokenSequence],
    scored: Sequence[SequenceLogps | Unscored],
    couples: Sequence[tuple[int, int]] | None = None,
    pictures: PictureInputs | None = None,
) -> NoiseFloor:
    """Score `sequences` again and compare with `scored`, what the run has for them.

    `couples`: (chosen, rejected) indices for the margins; by default (0, 1), (2, 3), …. A sequence that the run or
    the second pass could not score is left out, and its couple with it.
    """
    try:
        again = _plain_fp32(model, numerics, sequences, pictures)
    except (CannotWiden, RuntimeError) as error:
        return NoiseFloor(len(sequences), reason=_why(error, numerics))
    deltas = {i: _sum(s) - total for i, (s, total) in enumerate(zip(scored, again, strict=True)) if _usable(s, total)}
    if not deltas:
        return NoiseFloor(len(sequences), reason="no sequence of the sample could be scored")
    pairs = couples if couples is not None else [(i, i + 1) for i in range(0, len(sequences) - 1, 2)]
    margins = [abs(deltas[c] - deltas[r]) for c, r in pairs if c in deltas and r in deltas]
    sizes = [abs(d) for d in deltas.values()]
    return NoiseFloor(
        sequences=len(deltas),
        logp_mean=float(np.mean(sizes)),
        logp_max=max(sizes),
        margin_mean=float(np.mean(margins)) if margins else None,
        margin_max=max(margins, default=None),
        deltas=tuple(deltas.values()),
        measured=tuple(deltas),
    )


def _why(error: Exception, numerics: Numerics) -> str:
    """Why there is no second pass. The run's own pass was made, and needs less memory: it goes on."""
    if isinstance(error, CannotWiden):
        return str(error)
    if not memory.is_out_of_memory(error):
        raise error
    memory.release(numerics.device_kind)
    return f"{numerics.device} has no room for the plain path in float32"


def _plain_fp32(
    model: Any, numerics: Numerics, sequences: Sequence[TokenSequence], pictures: PictureInputs | None
) -> list[float]:
    """float64 sums of the plain path in fp32, one per sequence."""
    totals = [0.0] * len(sequences)
    asked = [i for i, s in enumerate(sequences) if len(s.scored_positions)]
    with running(numerics), widened(model):
        path = make_path(model, numerics, plain=True, pictures=pictures)
        for batch in path.plan([sequences[i] for i in asked]):
            members = [asked[i] for i in batch]
            for i, values in zip(members, path.compute([sequences[i] for i in members]), strict=True):
                totals[i] = float(values["logp"].sum(dtype=np.float64))
    return totals


def _sum(scored: SequenceLogps | Unscored) -> float:
    return float(scored.token_logps.sum(dtype=np.float64)) if isinstance(scored, SequenceLogps) else float("nan")


def _usable(scored: SequenceLogps | Unscored, again: float) -> bool:
    return isinstance(scored, SequenceLogps) and bool(np.isfinite(again))
