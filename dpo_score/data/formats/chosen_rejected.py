"""Formats that name the better side themselves: columns called chosen and rejected, or in other words that say so.

Whatever the two columns are called in a set (SIDE_NAMES), the formats here see them as chosen and rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpo_score.data.column_types import (
    Shapes,
    either,
    is_message,
    is_messages,
    is_text,
    is_texts,
    is_turn_pairs,
    struct_with,
)
from dpo_score.data.formats.base import (
    Column,
    Content,
    Found,
    ReadOptions,
    as_seen,
    assistant_answer,
    pair,
    preference_format,
    user_prompt,
    whole_conversations,
)
from dpo_score.data.formats.cells import (
    Row,
    answer,
    checked_text,
    conversation,
    decoded_json,
    ended_by_assistant,
    list_cell,
    optional_text,
    struct_item,
    text_cell,
    text_inside,
)
from dpo_score.data.formats.transcripts import ASSISTANT, hh_messages
from dpo_score.data.types import Message, Pair, Unusable, text_of

_SIDE_ENDINGS = (
    "response",
    "conversations",
    "conversation",
    "messages",
    "answer",
    "completion",
    "output",
    "text",
    "step",
)
SIDE_NAMES = (
    ("chosen", "rejected"),
    *((f"chosen_{ending}", f"rejected_{ending}") for ending in _SIDE_ENDINGS),
    ("response", "rejected_response"),
    ("output", "rejected_response"),
    ("chosen", "reject"),
    ("preferred", "dispreferred"),
    ("preferred", "rejected"),
    ("accepted", "rejected"),
    ("response_j", "response_k"),
)
"""Names of the better and the worse side, the better first; a set has the sides of the first that is there."""
PROMPT_NAMES = ("prompt", "question", "instruction", "input", "query")
TURN_NAMES = ("messages", "trajectory", "context", "conversation", "conversation_input", "chat_history", "history")
"""Columns of earlier messages that are the prompt where no column is called prompt."""
PROMPT_LIKE = (*PROMPT_NAMES, *TURN_NAMES, "conversations", "dialogue", "dialog", "problem")
"""Columns that say what was asked: two texts beside one of them are not whole conversations."""
ALIKE, BOTH, PART = 0.9, 0.95, 0.05
"""Shares of the sampled rows that must begin alike, that must hold a marker or the prompt on both sides, and that may
do so in a set which other rows were mixed into."""
SEVERAL_WORDS = 3
"""Two answers do not begin with so many words of their prompt by chance."""

is_turns = either(is_messages, is_message)
is_answer = either(is_messages, is_message, is_text)
PROMPT = Column("prompt", is_text, also=PROMPT_NAMES[1:])
CHOSEN_IS_BETTER = "chosen is better than rejected"


def names_its_sides(shapes: Shapes) -> bool:
    """Whether a set has columns for the better and the worse side."""
    return "chosen" in shapes and "rejected" in shapes


def text_prompts(shapes: Shapes) -> list[str]:
    """Columns that can be the prompt, best name first."""
    return [name for name in PROMPT_NAMES if is_text(shapes.get(name))]


def _sides(fits: Any) -> tuple[Column, Column]:
    return Column("chosen", fits), Column("rejected", fits)


def _sampled_sides(rows: Sequence[Row]) -> Iterator[tuple[Any, Any]]:
    return ((row.get("chosen"), row.get("rejected")) for row in rows)


# --- pair-text: three strings ---------------------------------------------------------------------------------------


def _is_alpaca(shapes: Shapes) -> bool:
    return text_prompts(shapes) == ["instruction", "input"]


def _has_steps(shapes: Shapes) -> bool:
    return is_text(shapes.get("initial_reason_steps"))


HISTORY = Column("history", either(is_messages, is_turn_pairs), also=("context",), optional=True, earlier_turns=True)
_BESIDE = ("messages", "labelling_prompt", "generations", "generation_prompt")


def _with_history(row: Row, prompt: str, chosen: str, rejected: str) -> Found:
    """Text; a conversation where the set has a column of earlier turns (also in rows that have none)."""
    if "history" not in row:
        return [pair(prompt, chosen, rejected)]
    turns: list[Message] = []
    for turn in list_cell(row, "history") if row["history"] else ():
        if isinstance(turn, Mapping):
            turns += conversation({"history": turn}, "history")
        else:
            asked, answered = (checked_text(text, "history") for text in _two(turn, "history"))
            turns += [*user_prompt(asked), *assistant_answer(answered)]
    return [pair((*turns, *user_prompt(prompt)), assistant_answer(chosen), assistant_answer(rejected))]


def _two(value: Any, column: str) -> list[Any]:
    items = list_cell({column: value}, column)
    if len(items) != 2:
        raise Unusable("wrong_type", f"{column} holds {len(items)} items where there should be two", column, value)
    return items


@preference_format(
    name="pair-text",
    code="F1",
    needs=(PROMPT, *_sides(is_text), HISTORY),
    unless=lambda shapes: _is_alpaca(shapes) or _has_steps(shapes),
    columns="prompt (or question, instruction, input, query), chosen, rejected (or *_response): strings; "
    "system and history (or context: messages) optional",
    polarity=CHOSEN_IS_BETTER,
    beside=_BESIDE,
)
def pair_text(row: Row, options: ReadOptions) -> Found:
    prompt, chosen, rejected = (text_cell(row, column) for column in ("prompt", "chosen", "rejected"))
    return _with_history(row, prompt, chosen, rejected)


def _repeat_the_prompt(rows: Sequence[Row]) -> bool:
    """Whether both sides begin with the prompt in nearly all rows, or with a prompt of several words in some.

    A single short prompt that an answer begins with by chance ("Hi", "Hi there") does not make a set one that repeats.
    """
    hits = [row["prompt"] for row in rows if _begins_with(*(row.get(key) for key in ("prompt", "chosen", "rejected")))]
    long = sum(len(prompt.split()) >= SEVERAL_WORDS for prompt in hits)
    return len(hits) >= BOTH * len(rows) > 0 or long >= max(PART * len(rows), 1)


def _begins_with(prompt: Any, chosen: Any, rejected: Any) -> bool:
    texts = (prompt, chosen, rejected)
    if not all(isinstance(text, str) for text in texts) or not prompt.strip():
        return False
    return all(side.startswith(prompt) and len(side) > len(prompt) for side in (chosen, rejected))


@preference_format(
    name="pair-text",
    variant="repeated",
    code="F1",
    needs=(PROMPT, *_sides(is_text), HISTORY),
    unless=lambda shapes: _is_alpaca(shapes) or _has_steps(shapes),
    sample_fits=_repeat_the_prompt,
    columns="prompt, chosen, rejected: strings; in every row, or in a part of them, both answers begin with the prompt",
    polarity=f"{CHOSEN_IS_BETTER}; where both begin with the prompt it is cut off from them",
    beside=_BESIDE,
)
def pair_text_repeated(row: Row, options: ReadOptions) -> Found:
    """Rows whose sides do not both begin with the prompt stay as they are."""
    prompt, chosen, rejected = (text_cell(row, column) for column in ("prompt", "chosen", "rejected"))
    if _begins_with(prompt, chosen, rejected):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return _with_history(row, prompt, chosen, rejected)


def joined_instruction(row: Row) -> str:
    """Instruction and input as LLaMA-Factory joins them: by a line break, without an empty one."""
    parts = (text_cell(row, "instruction"), optional_text(row, "input"))
    return "\n".join(part for part in parts if part)


@preference_format(
    name="pair-text",
    variant="alpaca",
    code="F1",
    needs=(Column("instruction", is_text), Column("input", is_text), *_sides(is_text), HISTORY),
    unless=lambda shapes: not _is_alpaca(shapes),
    columns="instruction and input (joined by a line break), chosen, rejected: strings; system and history optional",
    polarity=CHOSEN_IS_BETTER,
)
def alpaca(row: Row, options: ReadOptions) -> Found:
    return _with_history(row, joined_instruction(row), text_cell(row, "chosen"), text_cell(row, "rejected"))


@preference_format(
    name="pair-text",
    variant="output-list",
    code="F1",
    needs=(
        Column("instruction", is_text, also=("prompt", "question")),
        Column("input", is_text, optional=True),
        Column("output", is_texts, also=("outputs",)),
        HISTORY,
    ),
    unless=names_its_sides,
    columns="instruction: string, input: string, optional; output: list of two strings (LLaMA-Factory's older form); "
    "system and history optional",
    polarity="the first of the two outputs is better than the second",
)
def output_list(row: Row, options: ReadOptions) -> Found:
    chosen, rejected = (checked_text(text, "output") for text in _two(row.get("output"), "output"))
    return _with_history(row, joined_instruction(row), chosen, rejected)


@preference_format(
    name="pair-text",
    variant="steps",
    code="F1",
    needs=(
        PROMPT,
        Column("initial_reason_steps", is_text),
        *_sides(is_text),
    ),
    columns="prompt, initial_reason_steps (on a new line behind it, or where the assistant's turn begins), chosen, "
    "rejected: strings (Step-DPO)",
    polarity="chosen is a better next step than rejected",
    beside=("full_chosen", "full_rejected"),
    answer_start=True,
)
def steps(row: Row, options: ReadOptions) -> Found:
    prompt, chosen, rejected = (text_cell(row, column) for column in ("prompt", "chosen", "rejected"))
    return [pair(prompt, chosen, rejected, answer_start=optional_text(row, "initial_reason_steps"))]


# --- two whole texts, with or without the markers of hh-rlhf --------------------------------------------------------


def _has_prompt_like(shapes: Shapes) -> bool:
    return any(name in shapes for name in PROMPT_LIKE)


def _are_transcripts(rows: Sequence[Row]) -> bool:
    hits = sum(all(ASSISTANT in str(side) for side in sides) for sides in _sampled_sides(rows))
    return bool(rows) and hits >= BOTH * len(rows)


def _begin_alike(rows: Sequence[Row]) -> bool:
    texts = [sides for sides in _sampled_sides(rows) if all(isinstance(side, str) for side in sides)]
    return bool(texts) and sum(_share_words(*sides) for sides in texts) >= ALIKE * len(texts)


def _share_words(chosen: str, rejected: str) -> bool:
    """Whether two texts begin with the same word at least, or the same eight characters; or one begins the other."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if shared is None:
        return bool(chosen and rejected)
    begun = chosen[:shared].lstrip()
    return len(begun) >= 8 or any(character.isspace() for character in begun)


@preference_format(
    name="pair-text-implicit",
    code="F1",
    needs=_sides(is_text),
    unless=_has_prompt_like,
    sample_fits=lambda rows: _begin_alike(rows) and not _are_transcripts(rows),
    columns="chosen, rejected: strings that both begin with the prompt; no column that could be the prompt",
    polarity=CHOSEN_IS_BETTER,
)
def pair_text_implicit(row: Row, options: ReadOptions) -> Found:
    return [pair("", text_cell(row, "chosen"), text_cell(row, "rejected"), implicit=True)]


@preference_format(
    name="hh-transcript",
    code="F2",
    needs=_sides(is_text),
    unless=_has_prompt_like,
    sample_fits=_are_transcripts,
    columns="chosen, rejected: transcripts with \\n\\nHuman: and \\n\\nAssistant: turns",
    polarity=CHOSEN_IS_BETTER,
)
def hh_transcript(row: Row, options: ReadOptions) -> Found:
    chosen, rejected = text_cell(row, "chosen"), text_cell(row, "rejected")
    for column, text in (("chosen", chosen), ("rejected", rejected)):
        if ASSISTANT not in text:
            raise Unusable("not_hh_transcript", f"{column} holds no {ASSISTANT!r}", column, text)
    return [pair("", chosen, rejected, implicit=True)]


# --- messages -------------------------------------------------------------------------------------------------------


@preference_format(
    name="messages-full",
    code="F3",
    needs=(Column("prompt", is_text, also=PROMPT_NAMES[1:], optional=True), *_sides(is_turns)),
    unless=lambda shapes: (
        is_turns(shapes.get("prompt"))
        or is_messages(shapes.get("conversations"))
        or (is_message(shapes.get("chosen")) and not text_prompts(shapes))
    ),
    columns="chosen, rejected: message lists that both begin with the prompt (a prompt string beside them is not "
    "read), or that hold the answer alone beside a prompt string",
    polarity=CHOSEN_IS_BETTER,
    content=Content.CONVERSATION,
    beside=("messages", "question", "conversation", "generation_prompt", "all_generated_responses"),
)
def messages_full(row: Row, options: ReadOptions) -> Found:
    """The context is what comes before the answer; a prompt column is taken only where there is nothing before it."""
    chosen, rejected = answer(row, "chosen"), answer(row, "rejected")
    prompt = row.get("prompt")
    if len(chosen) == len(rejected) == 1 and prompt:
        return [pair(user_prompt(text_cell(row, "prompt")), chosen, rejected)]
    marks = () if not isinstance(prompt, str) or _says_the_same(prompt, chosen) else ("prompt_unread",)
    return [replace(whole_conversations(chosen, rejected), marks=marks)]


def _says_the_same(prompt: str, turns: Sequence[Message]) -> bool:
    """Whether a prompt is a part of a conversation, or holds its last question; white space makes no difference."""
    texts = [text_of(turn.get("content")) for turn in turns]
    if not prompt.strip() or prompt in texts:
        return True
    said = [" ".join(text.split()) for text in texts]
    asked = [" ".join(text_of(turn["content"]).split()) for turn in hh_messages(prompt) or user_prompt(prompt)]
    question = next((text for text, turn in zip(said[::-1], turns[::-1], strict=True) if turn["role"] == "user"), "")
    return all(text in " ".join(said) for text in asked) or (bool(question) and question in asked[-1])


@preference_format(
    name="messages-full",
    variant="objects",
    code="F3",
    needs=_sides(struct_with(messages=is_messages)),
    unless=lambda shapes: is_turns(shapes.get("prompt")),
    columns="chosen, rejected: structs (or JSON texts) with messages, which begin with the prompt, and tools",
    polarity=CHOSEN_IS_BETTER,
    content=Content.CONVERSATION,
    beside=("messages",),
)
def message_objects(row: Row, options: ReadOptions) -> Found:
    chosen, rejected = (struct_item(row.get(side), side) for side in ("chosen", "rejected"))
    tools = [decoded_json(side.get("tools"), "tools") or None for side in (chosen, rejected)]
    if tools[0] != tools[1]:
        raise Unusable("context_mismatch", "the two sides have different tools", "tools")
    found = whole_conversations(answer(chosen, "messages"), answer(rejected, "messages"))
    return [replace(found, tools=tools[0])]


@preference_format(
    name="messages-explicit",
    code="F4",
    needs=(Column("prompt", is_turns), *_sides(is_answer)),
    columns="prompt: message list; chosen, rejected: the answer's messages, message or string",
    polarity=CHOSEN_IS_BETTER,
    content=Content.CONVERSATION,
    beside=("messages",),
)
def messages_explicit(row: Row, options: ReadOptions) -> Found:
    return [after_prompt(conversation(row, "prompt"), answer(row, "chosen"), answer(row, "rejected"))]


def after_prompt(prompt: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Pair:
    """The pair, with the prompt cut off from sides that repeat it, with or without its system turn.

    A system turn that only the sides have, the same on both, becomes the prompt's.
    """
    cuts = _repeated(prompt, chosen), _repeated(prompt, rejected)
    if None in cuts:
        return pair(prompt, chosen, rejected)
    heads = [side[: at or 0] for side, at in zip((chosen, rejected), cuts, strict=True)]
    if as_seen(heads[0]) != as_seen(heads[1]):
        raise Unusable("context_mismatch", "the two answers repeat the prompt with different system texts", "chosen")
    begun = heads[0] if len(heads[0]) > len(prompt) else prompt
    return pair(begun, chosen[cuts[0] :], rejected[cuts[1] :])


def _repeated(prompt: tuple[Message, ...], side: tuple[Message, ...]) -> int | None:
    """How many messages of a side repeat the prompt; None if it does not begin with the prompt."""
    if len(side) == 1 or side[0]["role"] == "assistant":
        return None
    whole, bare = as_seen(prompt), as_seen(_without_system(prompt))
    forms = [(whole, side), (bare, side) if len(bare) < len(whole) else (whole, _without_system(side))]
    for expected, begun in forms:
        count = len(expected)
        if count and len(begun) > count and as_seen(begun[:count]) == expected:
            return count + len(side) - len(begun)
    return None


def _without_system(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    return turns[1:] if turns and turns[0]["role"] == "system" else turns


def _has_prompt(shapes: Shapes) -> bool:
    """Whether a column is called prompt or conversations, or is a text that can be the prompt."""
    return "prompt" in shapes or "conversations" in shapes or bool(text_prompts(shapes))


def _hold_answers(rows: Sequence[Row]) -> bool:
    """Whether the sides are the answers alone: strings, single messages, or lists that begin with the assistant."""
    return bool(rows) and all(_is_bare(side) for sides in _sampled_sides(rows) for side in sides if side)


def _is_bare(side: Any) -> bool:
    first = side[0] if isinstance(side, list | tuple) else side
    role = first.get("role", first.get("from")) if isinstance(first, Mapping) else "assistant"
    return not isinstance(role, str) or role.lower() not in ("system", "user", "human", "prompter")


@preference_format(
    name="messages-explicit",
    variant="other-name",
    code="F4",
    needs=(Column("messages", is_turns, also=TURN_NAMES[1:]), *_sides(is_answer)),
    unless=_has_prompt,
    sample_fits=_hold_answers,
    columns="messages (or trajectory, context, conversation, history): message list; chosen, rejected: the answer's "
    "messages, message or string (axolotl, UltraInteract)",
    polarity=CHOSEN_IS_BETTER,
    content=Content.CONVERSATION,
)
def messages_other_name(row: Row, options: ReadOptions) -> Found:
    return [after_prompt(conversation(row, "messages"), answer(row, "chosen"), answer(row, "rejected"))]


@preference_format(
    name="messages-explicit",
    variant="answer-structs",
    code="F4",
    needs=(
        Column("conversation_input", is_messages, also=("prompt", "messages")),
        *_sides(struct_with(answer=is_text)),
    ),
    columns="conversation_input: message list; chosen, reject: structs with answer (RMB)",
    polarity="chosen is better than reject",
    content=Content.CONVERSATION,
)
def answer_structs(row: Row, options: ReadOptions) -> Found:
    chosen, rejected = (assistant_answer(text_inside(row, side, "answer")) for side in ("chosen", "rejected"))
    return [pair(conversation(row, "conversation_input"), chosen, rejected)]


@preference_format(
    name="openai",
    code="F4b",
    needs=(
        Column("input", struct_with(messages=is_messages)),
        Column("preferred_output", is_answer),
        Column("non_preferred_output", is_answer),
    ),
    columns="input: struct with messages and tools; preferred_output, non_preferred_output: messages",
    polarity="preferred_output is better than non_preferred_output",
    content=Content.CONVERSATION,
)
def openai(row: Row, options: ReadOptions) -> Found:
    given = struct_item(row.get("input"), "input")
    chosen, rejected = answer(row, "preferred_output"), answer(row, "non_preferred_output")
    return [replace(after_prompt(conversation(given, "messages"), chosen, rejected), tools=given.get("tools"))]


@preference_format(
    name="sharegpt",
    code="F10",
    needs=(Column("conversations", is_messages), *_sides(is_answer)),
    unless=lambda shapes: is_turns(shapes.get("prompt")),
    columns="conversations: list of from and value (without the answer); chosen, rejected: structs of from and value, "
    "or strings",
    polarity=CHOSEN_IS_BETTER,
    content=Content.CONVERSATION,
)
def sharegpt(row: Row, options: ReadOptions) -> Found:
    return [after_prompt(conversation(row, "conversations"), answer(row, "chosen"), answer(row, "rejected"))]


# --- ms-swift: the messages end with the better answer --------------------------------------------------------------


@preference_format(
    name="ms-swift",
    variant="rejected-response",
    code="F12",
    needs=(Column("messages", is_messages), Column("rejected_response", is_answer)),
    unless=lambda shapes: "chosen" in shapes,
    columns="messages: message list that ends with the better answer; rejected_response: string or messages",
    polarity="the last message of messages is better than rejected_response",
    content=Content.CONVERSATION,
)
def swift_response(row: Row, options: ReadOptions) -> Found:
    turns = ended_by_assistant(conversation(row, "messages"), "messages")
    return [after_prompt(turns[:-1], turns[-1:], answer(row, "rejected_response"))]


@preference_format(
    name="ms-swift",
    variant="rejected-messages",
    code="F12",
    needs=(Column("messages", is_messages), Column("rejected_messages", is_messages)),
    unless=lambda shapes: "chosen" in shapes,
    columns="messages, rejected_messages: message lists that both begin with the prompt",
    polarity="messages ends with a better answer than rejected_messages",
    content=Content.CONVERSATION,
)
def swift_messages(row: Row, options: ReadOptions) -> Found:
    return [whole_conversations(answer(row, "messages"), answer(row, "rejected_messages"))]


# --- what is no pair ------------------------------------------------------------------------------------------------


def is_unpaired(shapes: Shapes) -> bool:
    """Single answers with a label of their own: the form of KTO, in TRL's, ms-swift's and LLaMA-Factory's words."""
    if names_its_sides(shapes):
        return False
    label = next((shapes[name] for name in ("label", "kto_tag", "labels") if name in shapes), None)
    one_answer = any(name in shapes for name in ("completion", "response", "messages", "conversations", "output"))
    return one_answer and label is not None and label.kind in ("bool", "int")
