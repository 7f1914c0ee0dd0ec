"""Templates are programs of strangers: boxed in, with a stopped clock, and answered for row by row."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from dpo_score.config.schema import TextSpec
from dpo_score.data.types import Problem
from dpo_score.errors import ConfigError, ModelError
from dpo_score.tokenization.chat_template import ChatTemplate, chat_template, refuses_system
from tests.data.formats.golden_rows import bot, user
from tests.tiny import CHATML, byte_tokenizer

ASKED = [user("q")]


def template(source: str | dict[str, str] | None = CHATML, **text: Any) -> ChatTemplate:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    found = chat_template(tokenizer, TextSpec(**text))
    assert found is not None
    return found


def failed(source: str, messages: Any = ASKED, **kwargs: Any) -> Problem:
    found = template(source).render(messages, None, kwargs)
    assert isinstance(found, Problem)
    return found


def test_renders_what_the_tokenizer_would() -> None:
    expected = byte_tokenizer().apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert template().render(ASKED, None, {}, to_answer=True) == expected


def test_no_template_is_none() -> None:
    assert chat_template(byte_tokenizer(None), TextSpec()) is None


def test_another_template_comes_as_text_as_file_or_by_name(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("file {{ messages[0].content }}")
    named = {"default": CHATML, "short": "named {{ messages[0].content }}"}
    assert template(chat_template="text {{ messages[0].content }}").render(ASKED, None, {}) == "text q"
    assert template(chat_template=str(tmp_path / "t.jinja")).render(ASKED, None, {}) == "file q"
    assert template(named, chat_template="short").render(ASKED, None, {}) == "named q"
    with pytest.raises(ConfigError, match=r"--chat-template .*missing.jinja"):
        template(chat_template=str(tmp_path / "missing.jinja"))


def test_a_template_of_ten_million_characters_is_not_compiled() -> None:
    with pytest.raises(ModelError, match=r"10,000,0\d\d characters.*--chat-template"):
        template("{{ messages[0].content }}" + "{# long #}" * 1_000_000)


def test_tools_may_have_a_template_of_their_own() -> None:
    both = template({"default": "plain", "tool_use": "tools"})
    assert both.render(ASKED, None, {}) == "plain"
    assert both.render(ASKED, [{"name": "f"}], {}) == "tools"
    with pytest.raises(ModelError, match="--chat-template"):
        template({"other": "x"})


def test_arguments_of_the_run_give_way_to_the_rows() -> None:
    found = template("{{ style }}", chat_template_kwargs={"style": "run"})
    assert found.render(ASKED, None, {}) == "run"
    assert found.render(ASKED, None, {"style": "row"}) == "row"


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "add_generation_prompt", "tools"])
def test_a_row_cannot_set_how_the_template_is_called(name: str) -> None:
    assert failed(CHATML, **{name: True}).code == "template_error"


@pytest.mark.parametrize("name", ["tokenize", "tools", "messages"])
def test_a_run_that_would_set_it_is_refused_whole(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--chat-template-kwargs sets '{name}'"):
        template(chat_template_kwargs={"style": "run", name: []})


DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}|{{ strftime_now(\"%Y\") }}{% endif %}"


def test_a_printed_date_is_the_one_given() -> None:
    found = template(DATED, date="2024-07-26")
    assert found.render(ASKED, None, {}) == "26 Jul 2024|2024"
    assert found.date == "2024-07-26"
    assert found.sha256 == template(DATED, date="2025-01-01").sha256 != template().sha256


def test_without_one_it_is_todays_and_is_kept() -> None:
    found = template(DATED)
    assert found.date is not None
    today = datetime.date.fromisoformat(found.date)
    assert found.render(ASKED, None, {}) == today.strftime("%d %b %Y|%Y")


def test_a_template_without_a_date_keeps_none() -> None:
    assert template(date="2024-07-26").date is None


def test_a_wrong_date_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not a date such as"):
        template(DATED, date="26.7.2024")


def test_a_date_in_a_computed_format_fails_instead_of_vanishing() -> None:
    assert failed("{{ strftime_now('%' ~ 'Y') }}").code == "template_error"


@pytest.mark.parametrize(
    "source",
    ["\n  {% if true %}x{% endif %}\n y", "  {%- set a = 1 %}\n\n{{ a }}\n", "{# note #}\n{{ '\n' }}x"],
)
def test_stopping_the_clock_changes_no_other_character(source: str) -> None:
    """The macro before it must not eat or add white space."""
    with_clock = source + "{% if false %}{{ strftime_now('%Y') }}{% endif %}"
    tokenizer = byte_tokenizer(with_clock)
    expected = tokenizer.apply_chat_template(ASKED, tokenize=False)
    assert template(with_clock).render(ASKED, None, {}) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.missing.deeper }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ [][3].x }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '%s' % (1, 2) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    ],
)
def test_whatever_a_template_raises_is_the_rows_problem(source: str) -> None:
    problem = failed(source)
    assert problem.code == "template_error"
    assert len(problem.reason) < 200


def test_a_template_that_is_no_program_is_a_problem_too() -> None:
    assert failed("{% if %}").code == "template_error"


def test_too_much_text_is_refused() -> None:
    assert failed("{{ 'x' * 50000000 }}").code == "too_large"


def test_lone_surrogates_in_arguments_are_found() -> None:
    assert failed("{{ messages[0].tool_calls[0] }}", [{**user("q"), "tool_calls": ["\ud800"]}]).code == "invalid_utf8"


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"


def test_a_refused_system_role_is_told_from_other_failures() -> None:
    with_system = [{"role": "system", "content": "s"}, user("q")]
    for source, messages, expected in [
        (NO_SYSTEM, with_system, True),
        ("{{ raise_exception('never') }}", with_system, False),
        ("{{ raise_exception('never') }}", [user("q"), bot("a")], False),
        ("{{ messages[0].content.missing.x }}", with_system, False),
    ]:
        found = template(source)
        problem = found.render(messages, None, {})
        assert isinstance(problem, Problem)
        assert refuses_system(found, problem, messages, None, {}) is expected
