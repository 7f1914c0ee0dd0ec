"""What is stored of a pair's prompt: nearly equal prompts have one digest, so that they count as one cluster."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dpo_score.data.types import EncodedPair, Pair, Source, TokenIds
from dpo_score.results.schemas import prompt_digest


def encoded(prompt: Any, ids: tuple[int, ...] = (1, 2, 3), tokens: bool = False, **changes: Any) -> EncodedPair:
    kept = TokenIds(*(np.array(part, np.int32) for part in (ids, [4], [5])))
    pair = Pair(Source("d", "f", 0, 0), prompt, "yes", "no", kept if tokens else None, **changes)
    return EncodedPair(pair, kept)


@pytest.mark.parametrize(
    "other", ["what is\tsix times seven? ", "What is  six times seven?", "WHAT IS SIX TIMES SEVEN?"]
)
def test_case_and_spaces_do_not_make_another_prompt(other: str) -> None:
    assert prompt_digest(encoded(other, (7, 8))) == prompt_digest(encoded("What is six times seven?"))
    turn = ({"role": "user", "content": other},)
    assert prompt_digest(encoded(turn)) == prompt_digest(
        encoded(({"role": "user", "content": "What is six times seven?"},))
    )


def test_other_words_roles_and_tools_do() -> None:
    prompts: list[Any] = [
        "What is six times eight?",
        "Whatis six times seven?",
        ({"role": "user", "content": "What is six times seven?"},),
        ({"role": "system", "content": "What is six times seven?"},),
        ({"role": "user", "content": "What is"}, {"role": "user", "content": "six times seven?"}),
    ]
    found = {prompt_digest(encoded(prompt)) for prompt in prompts}
    assert len(found) == len(prompts)
    assert prompt_digest(encoded(prompts[0], tools=({"name": "add"},))) not in found


def test_a_pair_without_text_is_known_by_its_ids() -> None:
    assert prompt_digest(encoded("", (1, 2), tokens=True)) == prompt_digest(encoded("", (1, 2), tokens=True))
    assert prompt_digest(encoded("", (1, 2), tokens=True)) != prompt_digest(encoded("", (1, 3), tokens=True))
