"""Messages of a conversation, however the row spells it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dpo_score.data.formats.transcripts import message_count
from dpo_score.data.types import Pair, Source, TokenIds

SYSTEM, USER, ANSWER = ({"role": role, "content": "x"} for role in ("system", "user", "assistant"))


def pair(prompt: Any, chosen: Any, **how: Any) -> Pair:
    return Pair(Source("d", "f", 0, 0), prompt, chosen, chosen, **how)


@pytest.mark.parametrize(
    ("found", "count"),
    [
        (pair((USER,), (ANSWER,)), 2),
        (pair((SYSTEM, USER, ANSWER, USER), (ANSWER,)), 4),
        (pair((), (SYSTEM, USER, ANSWER), implicit=True), 2),
        (pair("What?", " This."), 2),
        (pair("", "This."), 1),
        (pair("", "What? This.", implicit=True), 2),
        (pair("", "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", implicit=True), 4),
        (pair("\n\nHuman: a\n\nAssistant:", " b"), 2),
    ],
)
def test_messages_of_prompt_and_answer_without_the_system_text(found: Pair, count: int) -> None:
    assert message_count(found) == count


def test_token_ids_do_not_say() -> None:
    ids = np.arange(3, dtype=np.int32)
    assert message_count(pair("", "", tokens=TokenIds(ids, ids, ids))) is None
