"""Where the answer begins in token ids, and how a pair is cut to a length. Pure.

P, PC, PR are the ids of the prompt alone, prompt + chosen and prompt + rejected, each tokenised as one sequence
(TRL 1.16): k = min(lcp(P, PC), lcp(P, PR)); prompt = P[:k], chosen = PC[k:], rejected = PR[k:].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dpo_score.pairs.cells import Problem
from dpo_score.pairs.records import Ids, Mask, TokenIds


def shared_ids(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix of two id lists."""
    n = min(len(a), len(b))
    same = a[:n] == b[:n]
    return n if same.all() else int(np.argmin(same))


def boundary(prompt: Ids, with_chosen: Ids, with_rejected: Ids) -> int:
    """k of the module docstring."""
    return min(shared_ids(prompt, with_chosen), shared_ids(prompt, with_rejected))


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A pair after truncation, and whether each side lost tokens."""

    tokens: TokenIds
    chosen_truncated: bool = False
    rejected_truncated: bool = False


def cut(tokens: TokenIds, limit: int | None, truncation: Literal["keep_start", "keep_end", "reject"]) -> Cut | Problem:
    """Both sequences brought to at most `limit` tokens.

    keep_start keeps the first ones, as TRL's collator does; keep_end the last ones of each sequence; reject none.
    A prompt that alone fills `limit` leaves nothing to score under keep_start: `prompt_too_long`.
    """
    n = len(tokens.prompt)
    lengths = n + len(tokens.chosen), n + len(tokens.rejected)
    if limit is None or max(lengths) <= limit:
        return Cut(tokens)
    if truncation == "keep_end":
        return _last(tokens, limit)
    if n >= limit:
        return Problem("prompt_too_long", f"the prompt has {n} tokens, max_length is {limit}", "prompt", n)
    if truncation == "reject":
        return Problem(
            "too_long", f"the longer side has {max(lengths)} tokens, max_length is {limit}", None, max(lengths)
        )
    room = limit - n
    kept = replace(
        tokens,
        chosen=tokens.chosen[:room],
        rejected=tokens.rejected[:room],
        chosen_mask=_sliced(tokens.chosen_mask, slice(room)),
        rejected_mask=_sliced(tokens.rejected_mask, slice(room)),
    )
    return Cut(kept, lengths[0] > limit, lengths[1] > limit)


def _sliced(mask: Mask | None, part: slice) -> Mask | None:
    return None if mask is None else mask[part]


def _last(tokens: TokenIds, limit: int) -> Cut:
    """The last `limit` tokens of each sequence.

    Sides of different lengths lose different amounts of the prompt. Then no prompt is shared any more: what is
    left of it moves into each response, under a mask that does not score it.
    """
    lost = [max(len(tokens.prompt) + len(side) - limit, 0) for side in (tokens.chosen, tokens.rejected)]
    n = len(tokens.prompt)
    if lost[0] == lost[1] and lost[0] <= n:
        prompt_mask = _sliced(tokens.prompt_mask, slice(lost[0], None))
        return Cut(replace(tokens, prompt=tokens.prompt[lost[0] :], prompt_mask=prompt_mask), True, True)
    chosen = _whole(tokens.prompt, tokens.prompt_mask, tokens.chosen, tokens.chosen_mask, lost[0])
    rejected = _whole(tokens.prompt, tokens.prompt_mask, tokens.rejected, tokens.rejected_mask, lost[1])
    none = np.zeros(0, dtype=np.int32)
    return Cut(TokenIds(none, chosen[0], rejected[0], None, chosen[1], rejected[1]), lost[0] > 0, lost[1] > 0)


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
