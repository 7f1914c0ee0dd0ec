"""Each mark is set where its cause is, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_score.config.schema import TextSpec
from dpo_score.data.types import MARKS, EncodedPair, Pair, Source, TokenIds
from dpo_score.tokenization.flags import example, repeats_prompt
from dpo_score.tokenization.render import Renderer
from tests.data.formats.golden_rows import bot, user
from tests.tiny import CHATML, byte_tokenizer

HERE = Source("set", "rows.parquet", 0, 7)
ASKED = (user("q?"),)


def pair(prompt: Any, chosen: Any, rejected: Any = None) -> Pair:
    if isinstance(chosen, str) and not isinstance(prompt, str):
        chosen, rejected = (bot(chosen),), (bot(rejected or "no"),)
    return Pair(HERE, prompt, chosen, rejected or "no")


def marks_of(item: Pair, tokenizer: Any = None, **text: Any) -> set[str]:
    [found] = Renderer(tokenizer or byte_tokenizer(), TextSpec(**text)).encode([item])
    assert isinstance(found, EncodedPair), found
    assert set(found.marks) <= set(MARKS)
    return set(found.marks)


def test_an_ordinary_pair_has_no_mark() -> None:
    assert marks_of(pair("q?", "yes")) == set()
    assert marks_of(pair(ASKED, "yes")) == set()


def test_boundary_shift_when_the_prompt_alone_is_not_how_it_begins() -> None:
    thinking = CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>' }}{% endif")
    assert marks_of(pair(ASKED, "yes"), byte_tokenizer(thinking)) == {"boundary_shift"}


def test_special_in_text_when_a_row_spells_a_special_token() -> None:
    assert marks_of(pair("what is <|im_end|>?", "yes")) == {"special_in_text"}
    assert marks_of(pair(ASKED, "say <|im_end|> now")) == {"special_in_text"}
    assert marks_of(pair("q?", "an answer that brings its own end<|im_end|>")) == set()


@pytest.mark.parametrize(
    ("source", "answer", "altered"),
    [
        ("{{ messages[-1].content.split('</think>')[-1] }}", bot("<think>why</think>yes"), True),
        ("{{ messages[-1].content.split('</think>')[-1] }}", bot("yes"), False),
        ("{{ messages[-1].content | trim }}", bot("  yes \n"), False),
        ("{{ messages[-1].content | upper }}", bot("yes"), True),
        ("{{ messages[-1].content }}", {**bot("yes"), "reasoning_content": "why"}, True),
        ("{{ messages[-1].reasoning_content }}{{ messages[-1].content }}",
         {**bot("yes"), "reasoning_content": "why"}, False),
        ("{{ messages[-1].content }}", {**bot("yes"), "tool_calls": [{"function": {"name": "find"}}]}, True),
    ],
)  # fmt: skip
def test_content_altered_when_text_of_the_row_is_not_in_the_rendering(source: str, answer: Any, altered: bool) -> None:
    template = "{{ messages[0].content }}:{% if messages | length > 1 %}" + source + "{% endif %}<|im_end|>"
    found = marks_of(Pair(HERE, ASKED, (answer,), (bot("NO"),)), byte_tokenizer(template))
    assert ("content_altered" in found) is altered


def test_content_altered_looks_behind_the_prompt_for_the_answer() -> None:
    """The answer's words stand in the question, which must not hide that the answer is gone."""
    template = "{{ messages[0].content }}: {% if messages | length > 1 %}gone{% endif %}<|im_end|>"
    assert "content_altered" in marks_of(pair((user("yes or no?"),), "yes", "no"), byte_tokenizer(template))


def test_a_thought_that_the_prompt_opens_is_not_missing_from_the_answer() -> None:
    opening = CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>' }}{% endif")
    item = pair(ASKED, "<think>why</think>yes", "<think>so</think>no")
    assert marks_of(item, byte_tokenizer(opening)) == set()


def test_content_altered_in_the_history() -> None:
    template = "{{ messages[-2].content }}>{{ messages[-1].content }}<|im_end|>"
    longer = (user("q?"), bot("<think>old</think>x"), user("r?"))
    assert "content_altered" in marks_of(pair(longer, "yes"), byte_tokenizer(template))


def test_no_eos_when_nothing_ends_the_turn() -> None:
    assert marks_of(pair(ASKED, "yes"), byte_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")) == {
        "no_eos"
    }
    assert marks_of(pair(ASKED, "y" * 50), max_length=30) == set(), "a cut is not the template's doing"


def test_double_bos_when_text_and_tokenizer_both_begin_with_it() -> None:
    found = marks_of(pair("<|endoftext|>q?", "yes"), byte_tokenizer(None, bos=True))
    assert found == {"double_bos", "special_in_text"}


def test_identical_pair_when_both_sides_score_the_same_tokens() -> None:
    assert marks_of(pair("q?", "same", "same")) == {"identical_pair"}
    assert marks_of(pair("q?", "same start, then a", "same start, then b"), max_length=8) == {"identical_pair"}


def test_empty_answer_still_scores_its_end() -> None:
    assert marks_of(pair("q?", " ", "no")) == {"empty_answer"}
    assert marks_of(pair(ASKED, " ")) == {"empty_answer"}
    calling = Pair(HERE, ASKED, ({**bot(""), "tool_calls": [{"function": {"name": ""}}]},), (bot("no"),))
    assert marks_of(calling) == set()
    named = Pair(HERE, ASKED, ({"role": "assistant", "function_calls": "now()"},), (bot("no"),))
    assert "empty_answer" not in marks_of(named)
    assert "content_altered" in marks_of(named), "the template does not show the call"


ASKED_LONG = "What is the capital of France?"


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "marked"),
    [
        ("2 + 2?", "2 + 2? 4", "2  + 2?\n5", True),
        ("2 + 2?", "User: 2 + 2? 4", "Human:\n2 + 2? 5", True),
        ("2 + 2?", "2 + 2? 4", "5", False),
        (ASKED_LONG, f"{ASKED_LONG} Paris", "London", True),
        ("height of a man", "The height of a man is", "The height of a man was", False),
        ("", " a", " b", False),
        ((user("hi"),), (user("hi"), bot("a")), (user("hi "), bot("b")), True),
        ((user(ASKED_LONG),), (bot(f"{ASKED_LONG} Paris"),), (bot("London"),), True),
        ((user("hi"),), (bot("a"),), (bot("b"),), False),
    ],
)
def test_an_answer_that_begins_with_its_prompt(prompt: Any, chosen: Any, rejected: Any, marked: bool) -> None:
    assert repeats_prompt(Pair(HERE, prompt, chosen, rejected)) == marked


def test_a_repeated_prompt_is_marked_on_the_scored_row() -> None:
    asked = (user(ASKED_LONG),)
    doubled = Pair(HERE, asked, (user(f"{ASKED_LONG}\n"), bot("Paris")), (user(f"{ASKED_LONG}\n"), bot("London")))
    assert "prompt_in_answer" in marks_of(doubled)
    assert "prompt_in_answer" not in marks_of(pair(ASKED, "yes"))


@pytest.mark.parametrize(
    ("lead", "seen"),
    [
        ("<|im_start|>user\n", True),
        ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", True),
        ("<s>[INST] ", True),
        ("### Instruction:\n", True),
        ("You ask ", False),
        ("#" * 70 + "a", False),
    ],
)
def test_a_prompt_behind_the_marks_of_a_chat_template_is_found(lead: str, seen: bool) -> None:
    doubled = Pair(HERE, ASKED_LONG, f"{lead}{ASKED_LONG} Paris", f"{lead}{ASKED_LONG} London")
    assert ("prompt_in_answer" in marks_of(doubled)) is seen


@pytest.mark.parametrize("answer", ["yes", "yes, it is", " "])
def test_no_eos_is_not_hidden_by_a_token_that_opens_the_turn(answer: str) -> None:
    opened = "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    asked = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}" + opened
    assert "no_eos" in marks_of(pair(ASKED, answer), byte_tokenizer(asked)), "opened in the prompt"
    told = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    assert "no_eos" in marks_of(pair(ASKED, answer), byte_tokenizer(told)), "opened with the answer"


@pytest.mark.parametrize("behind", ["", "\n", " \n\n"])
def test_an_end_may_be_followed_by_line_breaks(behind: str) -> None:
    ended = "{% for m in messages %}{{ m.content }}<|im_end|>" + behind.replace("\n", "{{ '\\n' }}") + "{% endfor %}"
    assert "no_eos" not in marks_of(pair(ASKED, "yes"), byte_tokenizer(ended))
    assert "no_eos" in marks_of(pair(ASKED, "yes"), byte_tokenizer(ended.replace("<|im_end|>", "<|im_end|>.")))


def test_an_example_shows_both_sides_escaped_and_cut() -> None:
    [found] = Renderer(byte_tokenizer(), TextSpec()).encode([pair((user("q\x1b?"),), "long " * 50)])
    assert isinstance(found, EncodedPair)
    assert example(found) == f"'q\\x1b?' → '{'long ' * 16}…'"


def test_an_example_of_token_ids_shows_ids() -> None:
    ids = [np.array(part, np.int32) for part in ([1, 2], [3, 4, 5], [6])]
    [found] = Renderer(None, TextSpec()).encode([Pair(HERE, "", "", "", TokenIds(*ids))])
    assert isinstance(found, EncodedPair)
    assert example(found) == "'1 2' → '3 4 5'"


TRL_TEMPLATES = [
    ("deepseek_r1_distill", bot("<think>why</think>yes")),
    ("deepseekv3", bot("<think>why</think>yes")),
    ("qwen3", bot("<think>why</think>yes")),
    ("qwen2_5", {**bot("yes"), "reasoning_content": "why"}),
    ("glm4moe", bot("<think>why</think>yes")),
    ("lfm2", {**bot("yes"), "reasoning_content": "why"}),
    ("llama3", {**bot("yes"), "reasoning_content": "why"}),
]


@pytest.mark.parametrize(("name", "answer"), TRL_TEMPLATES)
def test_templates_in_use_that_drop_thinking_are_caught(name: str, answer: Any) -> None:
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    found = marks_of(Pair(HERE, ASKED, (answer,), (bot("no"),)), chat_template=str(path))
    assert "content_altered" in found
    plain = marks_of(pair(ASKED, "yes"), chat_template=str(path))
    assert "content_altered" not in plain


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "nemotron_3_nano", "lfm2_2_5"])
def test_templates_in_use_that_strip_thinking_from_the_history_are_caught(name: str) -> None:
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    history = (user("q?"), bot("<think>old reason</think>first"), user("and?"))
    assert "content_altered" in marks_of(pair(history, "yes"), chat_template=str(path))


def test_a_template_in_use_that_ends_no_turn_is_caught() -> None:
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / "glm4moe.jinja"
    assert "no_eos" in marks_of(pair(ASKED, "yes"), chat_template=str(path))


@pytest.mark.parametrize(("template", "seen"), [("{{ tools }}", True), ("", False)])
def test_tools_that_a_template_never_shows_are_marked(template: str, seen: bool) -> None:
    shown = template + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    asked = Pair(HERE, ASKED, (bot("yes"),), (bot("no"),), tools=({"name": "clock"},))
    assert ("tools_unseen" in marks_of(asked, byte_tokenizer(shown))) is not seen
    assert "tools_unseen" in marks_of(Pair(HERE, "q", "yes", "no", tools=({"name": "clock"},)))


@pytest.mark.parametrize(
    ("prompt", "empty"), [("", True), (" \n", True), ("q", False), ((user(""),), True), (ASKED, False)]
)
def test_an_empty_prompt_or_turn_is_marked(prompt: Any, empty: bool) -> None:
    answers = ("yes", "no") if isinstance(prompt, str) else ((bot("yes"),), (bot("no"),))
    assert ("empty_prompt" in marks_of(Pair(HERE, prompt, *answers))) is empty
