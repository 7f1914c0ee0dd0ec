"""The pair as it is scored: wrapped for a template, with its system text where it is wanted."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_score.config.schema import TextSpec
from dpo_score.data.types import Pair, Problem, Source
from dpo_score.errors import ConfigError
from dpo_score.tokenization.prompt import arranged
from tests.data.formats.golden_rows import bot, user

HERE = Source("set", "rows.parquet", 0, 7)


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def prompt_of(prompt: Any, **text: Any) -> Any:
    chat = not isinstance(prompt, str)
    pair = Pair(HERE, prompt, (bot("a"),) if chat else "a", (bot("b"),) if chat else "b")
    found = arranged(pair, TextSpec(**text))
    return found.prompt if isinstance(found, Pair) else found.code


OWN, NONE = (system("own"), user("q")), (user("q"),)


@pytest.mark.parametrize(
    ("mode", "given", "prompt", "expected"),
    [
        ("fill", "new", NONE, (system("new"), user("q"))),
        ("fill", "new", OWN, OWN),
        ("fill", None, OWN, OWN),
        ("replace", "new", OWN, (system("new"), user("q"))),
        ("replace", "new", NONE, (system("new"), user("q"))),
        ("drop", None, OWN, NONE),
        ("drop", None, NONE, NONE),
        ("merge-user", None, OWN, (user("own\n\nq"),)),
        ("merge-user", "new", NONE, (user("new\n\nq"),)),
        ("merge-user", None, NONE, NONE),
    ],
)
def test_the_system_text_stands_where_the_mode_says(mode: str, given: str | None, prompt: Any, expected: Any) -> None:
    assert prompt_of(prompt, system=given, system_mode=mode) == expected


def test_strings_stay_text_unless_chat_is_asked_for() -> None:
    assert prompt_of("q") == "q"
    assert prompt_of("q", render="raw") == "q"
    assert prompt_of("q", render="chat") == (user("q"),)


def test_a_transcript_becomes_its_turns_under_a_template() -> None:
    text = "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:"
    pair = Pair(HERE, "", f"{text} a", f"{text} b", implicit=True)
    found = arranged(pair, TextSpec(render="chat"))
    assert isinstance(found, Pair)
    assert found.prompt == (user("q"), bot("x"), user("r"))
    assert (found.chosen, found.rejected) == ((bot("a"),), (bot("b"),))
    assert not found.implicit


def test_conversations_are_never_flattened_to_text() -> None:
    with pytest.raises(ConfigError, match=r"--render raw .* row 0:7 of rows.parquet"):
        prompt_of(NONE, render="raw")


def test_plain_text_has_no_place_for_a_system_text() -> None:
    with pytest.raises(ConfigError, match="--render chat"):
        prompt_of("q", system="Be brief.")


def test_the_assistant_does_not_answer_itself_or_nobody() -> None:
    assert prompt_of((user("q"), bot("x"))) == "bad_role_order"
    assert isinstance(arranged(Pair(HERE, (), (bot("a"),), (bot("b"),)), TextSpec()), Problem)
    assert prompt_of((system("only"),), system_mode="drop") == "bad_role_order"
