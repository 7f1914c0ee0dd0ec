"""A pair as it will be scored: its prompt split off, strings wrapped for a chat template, the system text in place.

`arranged` does all of it. A row without a prompt of its own is split by `text.prompt_split`:

auto, marker   transcripts: after the last "\\n\\nAssistant:" that both texts share (the rule of the DPO reference
               implementation); conversations: before the last message, the turns before it being equal
trl            the first character, or message, that differs (TRL's `extract_prompt`, its edge cases included)
auto           is trl for two texts without markers, where there is nothing better to go by
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from dpo_score.config.schema import TextSpec
from dpo_score.data.formats.base import assistant_answer, same_context, user_prompt
from dpo_score.data.formats.transcripts import ASSISTANT, hh_messages
from dpo_score.data.types import SYSTEM_ROLES, Message, Pair, Problem, Text, Unusable, text_of
from dpo_score.errors import ConfigError


def arranged(pair: Pair, text: TextSpec) -> Pair | Problem:
    """The pair that the three renderings are made of. Raises ConfigError where `text` cannot apply to it."""
    found = divided(pair, text.prompt_split)
    if isinstance(found, Problem):
        return found
    if not found.is_conversation and text.render != "chat":
        _refuse_system_in_text(found, text)
        return begun(found)
    if found.is_conversation and text.render == "raw":
        raise ConfigError(
            f"--render raw cannot score conversations, but row {pair.source.row_id} of {pair.source.file} is one; "
            "leave --render at auto, or give the set as strings"
        )
    return _checked(with_system(begun(wrapped(found)), text))


def _refuse_system_in_text(pair: Pair, text: TextSpec) -> None:
    if text.system is not None:
        raise ConfigError(
            f"--system needs a chat template to stand in, but row {pair.source.row_id} of {pair.source.file} is "
            "plain text: say --render chat, or leave --system out"
        )


def _checked(pair: Pair) -> Pair | Problem:
    """A prompt must be there, and must leave the turn to the assistant."""
    if not pair.prompt:
        return Problem("bad_role_order", "the conversation begins with the answer: there is no prompt", "prompt")
    last = pair.prompt[-1]
    if isinstance(last, Mapping) and last["role"] == "assistant":
        return Problem(
            "bad_role_order", "the prompt ends with the assistant, who answers again", "prompt", last["role"]
        )
    return pair


def begun(pair: Pair) -> Pair:
    """The pair with the start of its answers in place: behind a prompt of text, at the head of an answer's message."""
    start = pair.answer_start
    if not start:
        return pair
    if isinstance(pair.prompt, str):
        return replace(pair, prompt=f"{pair.prompt}\n{start}", answer_start="")
    assert not isinstance(pair.chosen, str)
    assert not isinstance(pair.rejected, str)
    sides = [
        ({**side[0], "content": f"{start}{text_of(side[0].get('content'))}"}, *side[1:])
        for side in (pair.chosen, pair.rejected)
    ]
    return replace(pair, chosen=sides[0], rejected=sides[1])


def wrapped(pair: Pair) -> Pair:
    """Strings as one user and one assistant message each; a transcript's turns as messages."""
    if isinstance(pair.chosen, str) and isinstance(pair.rejected, str) and isinstance(pair.prompt, str):
        turns = hh_messages(pair.prompt) if pair.prompt.rstrip().endswith(ASSISTANT) else None
        chosen, rejected = (side.strip() if turns else side for side in (pair.chosen, pair.rejected))
        prompt = turns or user_prompt(pair.prompt)
        return replace(pair, prompt=prompt, chosen=assistant_answer(chosen), rejected=assistant_answer(rejected))
    return pair


def with_system(pair: Pair, text: TextSpec) -> Pair:
    """The conversation with its system text as `text.system_mode` says.

    fill: given where there is none · replace: given in place of the row's own · drop: taken out ·
    merge-user: put before the first user message, for templates that know no system role.
    """
    assert not isinstance(pair.prompt, str)
    turns = tuple(turn for turn in pair.prompt if turn["role"] not in SYSTEM_ROLES)
    own = next((turn for turn in pair.prompt if turn["role"] in SYSTEM_ROLES), None)
    given: Message | None = None
    if text.system:
        said = text.system if pair.pictures is None else ({"type": "text", "text": text.system},)
        given = {"role": "system", "content": said}
    if text.system_mode == "merge-user":
        merged = own or given
        return replace(pair, prompt=_merged(turns, text_of(merged.get("content")))) if merged else pair
    if text.system_mode == "drop":
        return replace(pair, prompt=turns) if own else pair
    if given is None or (own is not None and text.system_mode == "fill"):
        return pair
    return replace(pair, prompt=(given, *turns))


def _merged(turns: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    at = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if at is None or not system:
        return turns
    content = turns[at].get("content", "")
    said = f"{system}\n\n{content}"
    parts = ({"type": "text", "text": f"{system}\n\n"}, *content) if isinstance(content, tuple) else None
    user = {**turns[at], "content": said if parts is None else parts}
    return (*turns[:at], user, *turns[at + 1 :])


# --- where an implicit prompt ends ------------------------------------------------------------------------------


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
