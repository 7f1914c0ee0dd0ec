"""Where the prompt ends in a row that has none of its own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_score.data.types import Pair, Problem, Source
from dpo_score.tokenization.prompt import divided, shared_length
from tests.data.formats.golden_rows import bot, user

HERE = Source("set", "file", 0, 0)


def split(chosen: Any, rejected: Any, rule: Any = "auto") -> Any:
    found = divided(Pair(HERE, "" if isinstance(chosen, str) else (), chosen, rejected, implicit=True), rule)
    return (found.prompt, found.chosen, found.rejected) if isinstance(found, Pair) else found.code


def hh(*turns: str) -> str:
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


def test_a_transcript_splits_after_the_last_shared_marker() -> None:
    chosen, rejected = hh("q", "x", "r", "Yes, it is."), hh("q", "x", "r", "Yes, it was.")
    assert split(chosen, rejected) == (hh("q", "x", "r") + "\n\nAssistant:", " Yes, it is.", " Yes, it was.")


def test_trl_splits_inside_what_two_answers_share() -> None:
    chosen, rejected = hh("q", "Yes, it is."), hh("q", "Yes, it was.")
    assert split(chosen, rejected, "trl") == (hh("q", "Yes, it"), " is.", " was.")


def test_an_empty_answer_leaves_the_other_one_whole() -> None:
    assert split("\n\nHuman: q\n\nAssistant:", hh("q", "a")) == ("\n\nHuman: q\n\nAssistant:", "", " a")


def test_transcripts_of_different_questions_share_no_marker() -> None:
    assert split(hh("q", "a"), hh("p", "b")) == "context_mismatch"


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("abc d", "abc e", ("abc", " d", " e")),
        ("abc d", "abc d e", ("abc ", "d", "d e")),
        ("same", "same", ("sam", "e", "e")),
        ("ax", "bx", ("", "ax", "bx")),
        ("ax ", "bx", ("ax", " ", "x")),
        ("", "b", ("", "", "b")),
    ],
)
def test_trls_rule_and_its_edge_cases(chosen: str, rejected: str, expected: tuple[str, ...]) -> None:
    assert split(chosen, rejected, "trl") == expected
    assert split(chosen, rejected, "auto") == expected


def test_texts_without_a_marker_cannot_be_split_at_one() -> None:
    assert split("abc d", "abc e", "marker") == "context_mismatch"


def test_conversations_split_before_the_last_message() -> None:
    context = (user("q"), bot("x"), user("r"))
    for rule in ("auto", "marker", "trl"):
        assert split((*context, bot("a")), (*context, bot("b")), rule) == (context, (bot("a"),), (bot("b"),))
        assert split((*context, bot("a")), (*context, bot("a")), rule) == (context, (bot("a"),), (bot("a"),))


def test_conversations_that_part_earlier_are_only_split_as_trl_does() -> None:
    chosen, rejected = (user("q"), bot("x"), user("r"), bot("a")), (user("q"), bot("y"), user("r"), bot("b"))
    assert split(chosen, rejected) == "context_mismatch"
    assert split(chosen, rejected, "trl") == ((user("q"),), chosen[1:], rejected[1:])


def test_a_conversation_of_one_message_has_no_prompt() -> None:
    assert split((bot("a"),), (bot("b"),)) == "bad_role_order"


def test_a_text_against_a_conversation_is_refused() -> None:
    pair = Pair(HERE, "", "text", (bot("b"),), implicit=True)
    assert isinstance(divided(pair, "auto"), Problem)


def test_an_explicit_prompt_stays_as_it_is() -> None:
    pair = Pair(HERE, "q", "a", "a b")
    assert divided(pair, "trl") is pair


@given(st.text("ab", max_size=30), st.text("ab", max_size=30))
def test_the_shared_length_is_what_counting_finds(a: str, b: str) -> None:
    slow = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert shared_length(a, b) == shared_length(list(a), list(b)) == slow
