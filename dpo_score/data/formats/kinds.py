"""How many messages a pair's conversation has."""

from __future__ import annotations

from dpo_score.data.formats.base import hh_messages
from dpo_score.data.types import SYSTEM_ROLES, Pair, Text


def messages(pair: Pair) -> int | None:
    """Messages of the prompt and the chosen answer, system texts not counted: 2 is one question and its answer.

    A transcript (`\\n\\nHuman: … \\n\\nAssistant: …`) has as many as it has turns, other strings one each. None for
    token ids, which do not say.
    """
    if pair.tokens is not None:
        return None
    if isinstance(pair.prompt, str) and isinstance(pair.chosen, str):
        turns = hh_messages(pair.prompt + pair.chosen)
        return len(turns) if turns else 1 + bool(pair.prompt or pair.implicit)
    return _counted(pair.prompt) + _counted(pair.chosen)


def _counted(text: Text) -> int:
    if isinstance(text, str):
        return int(bool(text))
    return sum(message.get("role") not in SYSTEM_ROLES for message in text)
