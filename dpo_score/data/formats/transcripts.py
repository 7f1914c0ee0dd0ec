"""Conversations written into one string, and how many messages a pair has.

In come texts with the turns of hh-rlhf (`\\n\\nHuman:`, `\\n\\nAssistant:`) or of HelpSteer2 (`<extra_id_1>User`);
out come messages.
"""

from __future__ import annotations

import re

from dpo_score.data.types import SYSTEM_ROLES, Message, Pair, Text

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_NEMO_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


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


def message_count(pair: Pair) -> int | None:
    """Messages of the prompt and the chosen answer, system texts not counted: 2 is one question and its answer.

    A transcript has as many as it has turns, other strings one each. None for token ids, which do not say.
    """
    if pair.tokens is not None:
        return None
    if isinstance(pair.prompt, str) and isinstance(pair.chosen, str):
        turns = hh_messages(pair.prompt + pair.chosen)
        return len(turns) if turns else 1 + bool(pair.prompt or pair.implicit)

    def counted(text: Text) -> int:
        return int(bool(text)) if isinstance(text, str) else sum(m.get("role") not in SYSTEM_ROLES for m in text)

    return counted(pair.prompt) + counted(pair.chosen)
