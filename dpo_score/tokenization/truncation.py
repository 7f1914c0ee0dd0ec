"""Where the answer begins in token ids, how long a row may be, and how a pair is cut to that length. Pure.

P, PC, PR are the ids of the prompt alone, prompt + chosen and prompt + rejected, each tokenised as one sequence
(TRL 1.16): k = min(lcp(P, PC), lcp(P, PR)); prompt = P[:k], chosen = PC[k:], rejected = PR[k:].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dpo_score.data.types import Ids, Mask, Problem, TokenIds
from dpo_score.errors import ConfigError


def shared_ids(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix of two id lists."""
    n = min(len(a), len(b))
    same = a[:n] == b[:n]
    return n if same.all() else int(np.argmin(same))


def boundary(prompt: Ids, with_chosen: Ids, with_rejected: Ids) -> int:
    """k of the module docstring."""
    return min(shared_ids(prompt, with_chosen), shared_ids(prompt, with_rejected))


@dataclass(frozen=True, slots=True)
class SideLimits:
    """The most tokens that an encoder takes of a prompt, and its decoder of an answer; None: any number."""

    prompt: int | None = None
    answer: int | None = None


def limit_of_rows(max_length: int | None, own: int | None) -> int | None:
    """Tokens of prompt and answer: `max_length` where it is asked for, else the model's `own` limit (None: none).

    ConfigError for more than the model can take.
    """
    if max_length is not None and own is not None and max_length > own:
        raise ConfigError(f"--max-length {max_length} is more than the model's own limit of {own} tokens")
    return max_length or own


def limits_of_sides(max_length: int | None, own: SideLimits) -> SideLimits:
    """As `limit_of_rows` for an encoder-decoder: `max_length` bounds prompt and answer alike, each within its own."""
    if max_length is None:
        return own
    if own.prompt is not None and own.answer is not None and max_length > max(own.prompt, own.answer):
        raise ConfigError(
            f"--max-length {max_length} is more than the model's own limits: {own.prompt} tokens of a prompt, "
            f"{own.answer} of an answer"
        )
    return SideLimits(min(max_length, own.prompt or max_length), min(max_length, own.answer or max_length))


def cut(
    tokens: TokenIds, limit: int | None, truncation: Literal["keep_start", "keep_end", "reject"]
) -> TokenIds | Problem:
    """Both sequences cut to at most `limit` tokens.

    keep_start keeps the first ones, as TRL's collator does; keep_end the last ones of each sequence; reject none.
    A prompt that alone fills `limit` leaves nothing to score under keep_start: `prompt_too_long`.
    """
    n = len(tokens.prompt)
    lengths = n + len(tokens.chosen), n + len(tokens.rejected)
    if limit is None or max(lengths) <= limit:
        return tokens
    if truncation == "keep_end":
        return _last(tokens, limit)
    if n >= limit:
        return Problem("prompt_too_long", f"the prompt has {n} tokens, max_length is {limit}", "prompt", n)
    if truncation == "reject":
        return Problem(
            "too_long", f"the longer side has {max(lengths)} tokens, max_length is {limit}", None, max(lengths)
        )
    room = limit - n
    return replace(
        tokens,
        chosen=tokens.chosen[:room],
        rejected=tokens.rejected[:room],
        chosen_mask=_sliced(tokens.chosen_mask, slice(room)),
        rejected_mask=_sliced(tokens.rejected_mask, slice(room)),
        chosen_truncated=lengths[0] > limit,
        rejected_truncated=lengths[1] > limit,
    )


def cut_apart(
    tokens: TokenIds, limits: SideLimits, truncation: Literal["keep_start", "keep_end", "reject"]
) -> TokenIds | Problem:
    """The prompt and both answers, each cut to its own limit: an encoder reads one and its decoder the other.

    keep_start keeps the first tokens of each, keep_end the last ones; reject none. Both sides lose what a prompt loses.
    """
    problem = _over(tokens, limits) if truncation == "reject" else None
    if problem is not None:
        return problem
    given, end = (tokens.prompt, tokens.chosen, tokens.rejected), truncation == "keep_end"
    parts = [_part(len(ids), most, end) for ids, most in zip(given, (limits.prompt, *2 * [limits.answer]), strict=True)]
    prompt, chosen, rejected = (ids[part] for ids, part in zip(given, parts, strict=True))
    masks = (tokens.prompt_mask, tokens.chosen_mask, tokens.rejected_mask)
    masks_kept = [_sliced(mask, part) for mask, part in zip(masks, parts, strict=True)]
    shorter = [len(after) < len(before) for after, before in zip((prompt, chosen, rejected), given, strict=True)]
    kept = TokenIds(prompt, chosen, rejected, masks_kept[0], masks_kept[1], masks_kept[2])
    return replace(kept, chosen_truncated=shorter[0] or shorter[1], rejected_truncated=shorter[0] or shorter[2])


def _over(tokens: TokenIds, limits: SideLimits) -> Problem | None:
    """What is too long, the prompt first."""
    n, longer = len(tokens.prompt), max(len(tokens.chosen), len(tokens.rejected))
    if limits.prompt is not None and n > limits.prompt:
        return Problem("prompt_too_long", f"the prompt has {n} tokens, its limit is {limits.prompt}", "prompt", n)
    if limits.answer is not None and longer > limits.answer:
        return Problem("too_long", f"the longer answer has {longer} tokens, its limit is {limits.answer}", None, longer)
    return None


def _part(size: int, limit: int | None, end: bool) -> slice:
    """Which of `size` tokens stay."""
    if limit is None or size <= limit:
        return slice(None)
    return slice(size - limit, None) if end else slice(limit)


def _sliced(mask: Mask | None, part: slice) -> Mask | None:
    return None if mask is None else mask[part]


def _last(tokens: TokenIds, limit: int) -> TokenIds:
    """The last `limit` tokens of each sequence.

    Sides of different lengths lose different amounts of the prompt. Then no prompt is shared any more: what is
    left of it moves into each response, under a mask that does not score it.
    """
    lost = [max(len(tokens.prompt) + len(side) - limit, 0) for side in (tokens.chosen, tokens.rejected)]
    n = len(tokens.prompt)
    if lost[0] == lost[1] and lost[0] <= n:
        prompt_mask = _sliced(tokens.prompt_mask, slice(lost[0], None))
        prompt = tokens.prompt[lost[0] :]
        return replace(tokens, prompt=prompt, prompt_mask=prompt_mask, chosen_truncated=True, rejected_truncated=True)
    chosen = _whole(tokens.prompt, tokens.prompt_mask, tokens.chosen, tokens.chosen_mask, lost[0])
    rejected = _whole(tokens.prompt, tokens.prompt_mask, tokens.rejected, tokens.rejected_mask, lost[1])
    none = np.zeros(0, dtype=np.int32)
    return TokenIds(none, chosen[0], rejected[0], None, chosen[1], rejected[1], lost[0] > 0, lost[1] > 0)


def _whole(prompt: Ids, prompt_mask: Mask | None, side: Ids, mask: Mask | None, lost: int) -> tuple[Ids, Mask]:
    scored = np.concatenate(
        [
            np.zeros(len(prompt), bool) if prompt_mask is None else prompt_mask,
            np.ones(len(side), bool) if mask is None else mask,
        ]
    )
    return np.concatenate([prompt, side])[lost:], scored[lost:]


def scored_count(prompt: Ids, prompt_mask: Mask | None, side: Ids, mask: Mask | None) -> int:
    """How many tokens of a sequence are scored; the first token of all has no predecessor and never is."""
    total = (0 if prompt_mask is None else int(prompt_mask.sum())) + (len(side) if mask is None else int(mask.sum()))
    first = prompt_mask if len(prompt) else mask
    first_is_scored = (len(prompt) == 0) if first is None else bool(first[:1].any())
    return total - int(first_is_scored and total > 0)
