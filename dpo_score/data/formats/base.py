"""The rules that the readers of formats share. A reader yields pairs without a source and an id; row.py adds both.

The rules: how a system text joins a prompt, how two whole conversations become
one comparison, how the turns written into one string are told apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_score.data.types import NOWHERE, Message, Pair, Problem, Text, Unusable

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_NEMO_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


@dataclass(frozen=True, slots=True)
class Reading:
    """The choices a person makes about a set, as the readers need them."""

    pairing: Literal["best-worst", "all", "adjacent", "random"] = "best-worst"
    preference: Literal["better", "safer"] | None = None
    keep_ties: bool = False
    seed: int = 0


def ordered(prompt: Text, first: Text, second: Text, preference: float, how: Reading, column: str) -> list[Any]:
    """One comparison from a signed preference: positive = `first` is better; zero is a tie."""
    if preference == 0:
        return [tie(prompt, first, second, how, column)]
    chosen, rejected = (first, second) if preference > 0 else (second, first)
    return [Pair(NOWHERE, prompt, chosen, rejected)]


def tie(prompt: Text, first: Text, second: Text, how: Reading, column: str) -> Pair | Problem:
    if how.keep_ties:
        return Pair(NOWHERE, prompt, first, second, tied=True)
    return Problem("tie", f"{column} says neither answer is better (--keep-ties scores such rows as given)", column)


def wrapped_user(text: str, system: str = "") -> tuple[Message, ...]:
    """A prompt string as a conversation."""
    user: Message = {"role": "user", "content": text}
    return ({"role": "system", "content": system}, user) if system else (user,)


def wrapped_answer(text: str) -> tuple[Message, ...]:
    return ({"role": "assistant", "content": text},)


def from_conversations(chosen: Sequence[Message], rejected: Sequence[Message]) -> Pair:
    """Two whole conversations: what they share is the prompt, which `text.prompt_split` finds."""
    return Pair(NOWHERE, (), tuple(chosen), tuple(rejected), implicit=True)


def same_context(first: Sequence[Message], second: Sequence[Message], columns: str) -> tuple[Message, ...]:
    """The turns before the two last ones; they must be equal, and not be missing."""
    if tuple(first[:-1]) != tuple(second[:-1]):
        raise Unusable("context_mismatch", f"the two answers follow different conversations in {columns}", columns)
    if len(first) < 2:
        raise Unusable("bad_role_order", f"{columns} begin with the answer: there is no prompt", columns)
    return tuple(first[:-1])


def hh_messages(transcript: str) -> tuple[Message, ...] | None:
    """The turns of `\\n\\nHuman: … \\n\\nAssistant: …`, without a last empty answer; None if it is something else."""
    if not transcript.startswith((HUMAN, HUMAN.lstrip())):
        return None
    transcript = "\n\n" + transcript.lstrip()
    pieces = _HH_TURN.split(transcript)[1:]
    turns = [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return tuple(turns)


def nemo_messages(prompt: str) -> tuple[Message, ...]:
    """HelpSteer2's prompts: the first turn is the user's, later ones follow `<extra_id_1>User` or `…Assistant`."""
    pieces = _NEMO_TURN.split(prompt)
    turns: list[Message] = [{"role": "user", "content": pieces[0]}]
    for who, said in zip(pieces[1::2], pieces[2::2], strict=True):
        turns.append({"role": who.lower(), "content": said})
    if turns[-1]["role"] == "assistant" and not str(turns[-1]["content"]).strip():
        turns.pop()
    return tuple(turns)
