"""A pair as it will be scored: prompt divided off, strings wrapped for a chat template, the system text in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dpo_score.config.schema import TextSpec
from dpo_score.data.formats.base import ASSISTANT, hh_messages, wrapped_answer, wrapped_user
from dpo_score.data.types import SYSTEM_ROLES, Message, Pair, Problem
from dpo_score.errors import ConfigError
from dpo_score.tokenization.prompt import divided


def arranged(pair: Pair, text: TextSpec) -> Pair | Problem:
    """The pair that the three renderings are made of. Raises ConfigError where `text` cannot apply to it."""
    found = divided(pair, text.prompt_split)
    if isinstance(found, Problem):
        return found
    if not found.is_conversation and text.render != "chat":
        _refuse_system_in_text(found, text)
        return found
    if found.is_conversation and text.render == "raw":
        raise ConfigError(
            f"--render raw cannot score conversations, but row {pair.source.row_id} of {pair.source.file} is one; "
            "leave --render at auto, or give the set as strings"
        )
    return _checked(with_system(wrapped(found), text))


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


def wrapped(pair: Pair) -> Pair:
    """Strings as one user and one assistant message each; a transcript's turns as messages."""
    if isinstance(pair.chosen, str) and isinstance(pair.rejected, str) and isinstance(pair.prompt, str):
        turns = hh_messages(pair.prompt) if pair.prompt.rstrip().endswith(ASSISTANT) else None
        chosen, rejected = (side.strip() if turns else side for side in (pair.chosen, pair.rejected))
        prompt = turns or wrapped_user(pair.prompt)
        return replace(pair, prompt=prompt, chosen=wrapped_answer(chosen), rejected=wrapped_answer(rejected))
    return pair


def with_system(pair: Pair, text: TextSpec) -> Pair:
    """The conversation with its system text as `text.system_mode` says.

    fill: given where there is none · replace: given in place of the row's own · drop: taken out ·
    merge-user: put before the first user message, for templates that know no system role.
    """
    assert not isinstance(pair.prompt, str)
    turns = tuple(turn for turn in pair.prompt if turn["role"] not in SYSTEM_ROLES)
    own = next((turn for turn in pair.prompt if turn["role"] in SYSTEM_ROLES), None)
    given: Message | None = {"role": "system", "content": text.system} if text.system else None
    if text.system_mode == "merge-user":
        merged = own or given
        return replace(pair, prompt=_merged(turns, str(merged.get("content", "")))) if merged else pair
    if text.system_mode == "drop":
        return replace(pair, prompt=turns) if own else pair
    if given is None or (own is not None and text.system_mode == "fill"):
        return pair
    return replace(pair, prompt=(given, *turns))


def _merged(turns: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    at = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if at is None or not system:
        return turns
    user = {**turns[at], "content": f"{system}\n\n{turns[at].get('content', '')}"}
    return (*turns[:at], user, *turns[at + 1 :])
