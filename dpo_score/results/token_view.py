"""Tokens for people: which are scored, and which carry a margin, β·(log π − log ρ) of each scored token.

`inspect` and the report show them; token ids and stored values come in, texts with numbers go out. No model is needed.
The values of a side add up to its reward (arXiv 2404.12358, eq. 11, without the value terms, which cancel in the
sum), so the differences between the two sides add up to the margin. A single token's value is not a reward by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_score.data.types import EncodedPair, Side
from dpo_score.losses.ops import Floats
from dpo_score.results.source_text import pieces

LEVELS = 3


@dataclass(frozen=True, slots=True)
class Token:
    """A token as text, and whether it is scored."""

    text: str
    scored: bool


def side_tokens(tokenizer: Any, item: EncodedPair, side: Side) -> list[Token]:
    """The tokens of one answer; the very first token of a sequence has no predecessor and is never scored."""
    positions = item.sequence(side).scored_positions - len(item.tokens.prompt)
    ids = item.tokens.chosen if side == "chosen" else item.tokens.rejected
    mask = np.zeros(len(ids), bool)
    mask[positions[positions >= 0]] = True
    return tokens(tokenizer, ids, mask, default=True)


def tokens(tokenizer: Any, ids: Any, mask: Any, default: bool) -> list[Token]:
    """Ids as text with what is scored; without a tokenizer the ids themselves are shown."""
    texts = pieces(tokenizer, ids) if tokenizer is not None else [f"{i} " for i in ids]
    scored = [default] * len(ids) if mask is None else [bool(flag) for flag in mask]
    return [Token(text, flag) for text, flag in zip(texts, scored, strict=True)]


def stored_shares(row: Mapping[str, Any], beta: float) -> dict[str, Floats] | None:
    """β·(log π − log ρ) of each scored token of both sides, None where token values are not stored."""
    shares = {}
    for side in ("chosen", "rejected"):
        policy, reference = row.get(f"policy_{side}_token_logps"), row.get(f"ref_{side}_token_logps")
        if policy is None or reference is None:
            return None
        shares[side] = token_shares(policy, reference, beta)
    return shares


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
