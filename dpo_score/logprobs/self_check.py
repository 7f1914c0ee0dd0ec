"""Is the fast path right on this model? A probe answers before the first block: packs are trusted, not assumed.

The probe is what breaks shared attention first: an empty prompt, a prompt of one token, three responses of one
prompt, and a row longer than the smallest sliding window. Its twin is the model called the ordinary way, one sequence
at a time, its own logits, fp32 log-softmax. In fp32 the two agree to 1e-4 nats per token; in 16 bits both are
compared with fp32 arithmetic, and the fast path may be at most 1.5 times as far off as the twin.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpo_score.data.types import Ids, TokenSequence
from dpo_score.logprobs.attention.interface import Unshareable
from dpo_score.logprobs.numerics import on_plain_path
from dpo_score.logprobs.packed import PackedPath
from dpo_score.logprobs.softmax import log_softmax
from dpo_score.logprobs.torch_settings import running
from dpo_score.logprobs.upcast import CannotWiden, widened
from dpo_score.models.memory import is_out_of_memory, room_for
from dpo_score.models.numerics import Numerics
from dpo_score.models.parallel.rank_zero import group_step
from dpo_score.models.parts import model_parts

Logps = NDArray[np.float32]
FP32_BOUND = 1e-4
NARROW_RATIO = 1.5
MISFITS = (Unshareable, RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What a model written for other pack may raise when it is given a pack (NotImplementedError is a RuntimeError)."""
LONG_TAIL = 24
"""Scored tokens of the long row: the ones that a window hides something from."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`max_delta`: largest |fast − twin| of a token in nats (None if the fast path could not run at all)."""

    ok: bool
    max_delta: float | None
    reason: str


def settle(model: Any, numerics: Numerics) -> tuple[Numerics, Verdict | None]:
    """The numerics to use: unchanged when the fast path is not asked for or proves right, else the plain path's."""
    if numerics.path != "fast":
        return numerics, None
    verdict = verify_fast_path(model, numerics)
    if verdict.ok:
        return numerics, verdict
    return on_plain_path(numerics), verdict


def verify_fast_path(model: Any, numerics: Numerics) -> Verdict:
    """Run the probe on both paths. Never raises for a model the fast path does not fit: that is a verdict.

    A device without room for the probe is no verdict, which would be remembered, but a ModelError.
    """
    room = room_for(f"the check of {type(model).__name__}'s fast path", numerics.device, numerics.dtype)
    with group_step(model, "verify", numerics), room, torch.inference_mode():
        return _verdict(model, numerics)


def _verdict(model: Any, numerics: Numerics) -> Verdict:
    parts = model_parts(model)
    sequences = probe(parts.model.config)
    with running(numerics):
        try:
            path = PackedPath(parts, replace(numerics, batch_tokens=0, compile=False))
            fast = _through(path, sequences)
        except MISFITS as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            return Verdict(False, None, f"the fast path does not fit {type(parts.model).__name__}: {error}")
        twin = _ordinary(parts.model, sequences)
        if numerics.dtype == "float32":
            return _fp32_verdict(fast, twin)
        return _narrow(path, sequences, fast, twin)


def _narrow(path: PackedPath, sequences: Sequence[TokenSequence], fast: Logps, twin: Logps) -> Verdict:
    """Both against fp32 arithmetic; a probe that overflows 16 bits is judged in fp32, where its packs will run."""
    try:
        with widened(path.parts.model):
            exact = _ordinary(path.parts.model, sequences)
            if not (np.isfinite(fast).all() and np.isfinite(twin).all()):
                return _fp32_verdict(_through(path, sequences), exact)
    except CannotWiden as error:
        return Verdict(False, _largest(fast - twin), f"there is no fp32 twin to verify against: {error}")
    off, allowed = _spread(fast - exact), max(NARROW_RATIO * _spread(twin - exact), FP32_BOUND)
    says = f"against fp32 the fast path is off by {off:.1e} nats (root mean square), {allowed:.1e} is the bound"
    return Verdict(off <= allowed, _largest(fast - twin), says)


def _fp32_verdict(fast: Logps, twin: Logps) -> Verdict:
    largest = _largest(fast - twin)
    if largest <= FP32_BOUND:
        return Verdict(True, largest, f"fast and plain agree to {largest:.1e} nats per token")
    return Verdict(False, largest, f"fast and plain differ by {largest:.1e} nats on a token; {FP32_BOUND} is the bound")


def _through(path: PackedPath, sequences: Sequence[TokenSequence]) -> Logps:
    return np.concatenate([values["logp"] for values in path.compute(sequences)])


def probe(config: Any) -> list[TokenSequence]:
    """The probe's sequences for a model of this configuration, always the same ones."""
    text = config.get_text_config(decoder=True)
    ids = _Ids(config)
    shared = ids.draw(13)
    sequences = [TokenSequence(shared, ids.draw(n)) for n in (7, 1, 18)]
    sequences += [TokenSequence(ids.draw(1), ids.draw(6)), TokenSequence(ids.draw(0), ids.draw(9))]
    window = smallest_window(text)
    if window is not None:
        sequences.append(TokenSequence(ids.draw(window + 5), ids.draw(LONG_TAIL)))
    return sequences


def smallest_window(text_config: Any) -> int | None:
    """The smallest sliding window that the longest sequence exceeds, or None."""
    window = getattr(text_config, "sliding_window", None)
    longest = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(window, int) or window <= 0 or getattr(text_config, "use_sliding_window", True) is False:
        return None
    return None if isinstance(longest, int) and window + 5 + LONG_TAIL > longest else window


class _Ids:
    """Ordinary token ids: below the vocabulary, none of those a configuration gives a meaning to."""

    def __init__(self, config: Any) -> None:
        text = config.get_text_config(decoder=True)
        settings = {**config.to_dict(), **text.to_dict()}
        special = {v for k, v in settings.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
        self.pool = np.array([i for i in range(min(int(text.vocab_size), 4096)) if i not in special], np.int32)
        self.random = np.random.default_rng(0)

    def draw(self, n: int) -> Ids:
        return self.random.choice(self.pool, n).astype(np.int32)


def _ordinary(model: Any, sequences: Sequence[TokenSequence]) -> Logps:
    return np.concatenate([_one(model, s) for s in sequences])


def _one(model: Any, sequence: TokenSequence) -> Logps:
    """Scored log-probabilities of one sequence from the model's own logits (only the last ones where it can)."""
    ids = torch.from_numpy(np.concatenate([sequence.prompt, sequence.response]).astype(np.int64)).to(model.device)
    positions = torch.from_numpy(sequence.scored_positions).to(model.device)
    kept = len(ids) - int(positions[0]) + 1
    some = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=ids[None], use_cache=False, **some).logits[0]
    rows = positions - 1 - (len(ids) - len(logits))
    logp = log_softmax(logits[rows].float()).gather(1, ids[positions][:, None])[:, 0]
    return logp.cpu().numpy()


def _largest(difference: Logps) -> float:
    """Largest absolute difference; anything not finite counts as infinite."""
    return float(np.abs(difference).max()) if np.isfinite(difference).all() else float("inf")


def _spread(difference: Logps) -> float:
    return (
        float(np.sqrt(np.mean(difference.astype(np.float64) ** 2))) if np.isfinite(difference).all() else float("inf")
    )
