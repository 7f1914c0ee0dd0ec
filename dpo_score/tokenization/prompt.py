"""Where the prompt of a row ends that has no prompt of its own.

auto, marker   transcripts: after the last "\\n\\nAssistant:" that both texts share (the rule of the DPO reference
               implementation); conversations: before the last message, the turns before it being equal
trl            the first character, or message, that differs (TRL's `extract_prompt`, its edge cases included)
auto           falls back to trl for two texts without markers, where there is nothing better to go by
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from dpo_score.data.formats.base import ASSISTANT, same_context
from dpo_score.data.types import Pair, Problem, Text, Unusable


def divided(pair: Pair, rule: Literal["auto", "marker", "trl"]) -> Pair | Problem:
    """`pair` with an explicit prompt; unchanged if it has one."""
    if not pair.implicit:
        return pair
    try:
        at = _trl_position(pair.chosen, pair.rejected) if rule == "trl" else _position(pair, rule)
    except Unusable as unusable:
        return unusable.problem
    prompt, chosen, rejected = pair.chosen[:at], pair.chosen[at:], pair.rejected[at:]
    return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected, implicit=False)


def _position(pair: Pair, rule: str) -> int:
    chosen, rejected = pair.chosen, pair.rejected
    if not isinstance(chosen, str) and not isinstance(rejected, str):
        return len(same_context(chosen, rejected, "chosen, rejected"))
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise Unusable("wrong_type", "one side is text, the other a conversation", "chosen, rejected")
    if rule == "auto" and not (ASSISTANT in chosen and ASSISTANT in rejected):
        return _trl_position(chosen, rejected)
    at = chosen.rfind(ASSISTANT, 0, shared_length(chosen, rejected))
    if at < 0:
        raise Unusable("context_mismatch", f"the two texts share no {ASSISTANT!r} to split at", "chosen, rejected")
    return at + len(ASSISTANT)


def _trl_position(chosen: Text, rejected: Text) -> int:
    """The first item that differs, one earlier after a space; the last shared one if none differs.

    A text that differs at once looks at its own last character for that space, and then ends up at -1:
    everything but the last character becomes the prompt. TRL does so; parity is the point of this rule.
    """
    shortest = min(len(chosen), len(rejected))
    at = shared_length(chosen, rejected)
    if at == shortest:
        return max(shortest - 1, 0)
    return at - 1 if chosen[at - 1] == " " else at


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix, by bisection: slices compare at memory speed."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
