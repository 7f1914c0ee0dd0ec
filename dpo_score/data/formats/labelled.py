"""Formats whose two answers are in neutral columns and whose label says which is better.

Wrong polarity is the usual fault of such readers, so each states it in one sentence, and all but one read it through
`base.ordered`: positive = the first answer is better.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dpo_score.data.column_types import (
    either,
    is_label,
    is_messages,
    is_number,
    is_text,
    items_with,
    present,
    struct_with,
)
from dpo_score.data.formats.base import (
    Column,
    Content,
    Found,
    ReadOptions,
    assistant_answer,
    ordered,
    preference_format,
    same_context,
)
from dpo_score.data.formats.cells import (
    Row,
    checked_text,
    conversation,
    decoded_json,
    ended_by_assistant,
    label_cell,
    list_cell,
    number_cell,
    optional_text,
    struct_item,
    text_cell,
    text_inside,
)
from dpo_score.data.formats.chosen_rejected import PROMPT, joined_instruction, names_its_sides
from dpo_score.data.formats.transcripts import nemo_messages
from dpo_score.data.types import Message, Unusable
from dpo_score.escape import seen

# --- signed-preference ----------------------------------------------------------------------------------------------


@preference_format(
    name="signed-preference",
    variant="helpsteer2",
    code="F5",
    needs=(
        Column("prompt", is_text),
        Column("response_1", is_text),
        Column("response_2", is_text),
        Column("preference_strength", is_number),
    ),
    unless=names_its_sides,
    columns="prompt, response_1, response_2: strings; preference_strength: -3 … 3",
    polarity="a negative preference_strength means response_1 is better, a positive one response_2; 0 is a tie",
    content=Content.CONVERSATION,
)
def helpsteer2_preference(row: Row, options: ReadOptions) -> Found:
    strength = label_cell(row, "preference_strength", (-3, -2, -1, 0, 1, 2, 3))
    prompt = nemo_messages(text_cell(row, "prompt"))
    first, second = (assistant_answer(text_cell(row, column)) for column in ("response_1", "response_2"))
    return ordered(prompt, first, second, -strength, options, "preference_strength")


@preference_format(
    name="signed-preference",
    variant="helpsteer3",
    code="F5",
    needs=(
        Column("context", is_messages),
        Column("response1", is_text),
        Column("response2", is_text),
        Column("overall_preference", is_number),
    ),
    unless=names_its_sides,
    columns="context: message list; response1, response2: strings; overall_preference: -3 … 3",
    polarity="a negative overall_preference means response1 is better, a positive one response2; 0 is a tie",
    content=Content.CONVERSATION,
)
def helpsteer3(row: Row, options: ReadOptions) -> Found:
    strength = label_cell(row, "overall_preference", (-3, -2, -1, 0, 1, 2, 3))
    first, second = (assistant_answer(text_cell(row, column)) for column in ("response1", "response2"))
    return ordered(conversation(row, "context"), first, second, -strength, options, "overall_preference")


# --- better-id ------------------------------------------------------------------------------------------------------


@preference_format(
    name="better-id",
    code="F6",
    needs=(
        PROMPT,
        Column("response_0", is_text),
        Column("response_1", is_text),
        Column("better_response_id", is_label, optional=True),
        Column("safer_response_id", is_label, optional=True),
    ),
    unless=lambda shapes: (
        names_its_sides(shapes)
        or not any(is_label(shapes.get(f"{which}_response_id")) for which in ("better", "safer"))
    ),
    columns="prompt, response_0, response_1: strings; better_response_id and/or safer_response_id: 0 or 1",
    polarity="the response that better_response_id (or, as --preference says, safer_response_id) numbers is better",
)
def better_id(row: Row, options: ReadOptions) -> Found:
    column = f"{options.preference or ('better' if 'better_response_id' in row else 'safer')}_response_id"
    better = label_cell(row, column, (0, 1))
    first, second = text_cell(row, "response_0"), text_cell(row, "response_1")
    return ordered(text_cell(row, "prompt"), first, second, 1 if better == 0 else -1, options, column)


# --- ab-label -------------------------------------------------------------------------------------------------------


@preference_format(
    name="ab-label",
    variant="shp",
    code="F7",
    needs=(
        Column("history", is_text),
        Column("human_ref_A", is_text),
        Column("human_ref_B", is_text),
        Column("labels", is_label),
    ),
    unless=names_its_sides,
    columns="history, human_ref_A, human_ref_B: strings; labels: 0 or 1 (number, boolean or text)",
    polarity="labels 1 means human_ref_A is better, 0 means human_ref_B is",
)
def shp(row: Row, options: ReadOptions) -> Found:
    first_is_better = label_cell(row, "labels", (0, 1)) == 1
    first, second = text_cell(row, "human_ref_A"), text_cell(row, "human_ref_B")
    return ordered(text_cell(row, "history"), first, second, 1 if first_is_better else -1, options, "labels")


@preference_format(
    name="ab-label",
    variant="webgpt",
    code="F7",
    needs=(
        Column("question", either(is_text, struct_with(full_text=is_text))),
        Column("answer_0", is_text),
        Column("answer_1", is_text),
        Column("score_0", is_number),
        Column("score_1", is_number),
    ),
    unless=names_its_sides,
    columns="question: string or struct with full_text; answer_0, answer_1: strings; score_0, score_1: numbers",
    polarity="the answer with the higher score is better, equal scores are a tie; quotes are not part of the prompt",
    beside=("quotes_0", "quotes_1"),
)
def webgpt(row: Row, options: ReadOptions) -> Found:
    preference = number_cell(row, "score_0") - number_cell(row, "score_1")
    prompt = text_inside(row, "question", "full_text")
    first, second = text_cell(row, "answer_0"), text_cell(row, "answer_1")
    return ordered(prompt, first, second, preference, options, "score_0, score_1")


@preference_format(
    name="ab-label",
    variant="one-hot",
    code="F7",
    needs=(
        Column("winner_model_a", present),
        Column("winner_model_b", present),
        Column("winner_tie", present),
        Column("prompt", is_text),
        Column("response_a", is_text),
        Column("response_b", is_text),
    ),
    unless=names_its_sides,
    columns="prompt, response_a, response_b: strings or JSON lists of them; winner_model_a, winner_model_b, winner_tie",
    polarity="the winner column that is 1 names the better response",
    content=Content.CONVERSATION,
)
def arena_one_hot(row: Row, options: ReadOptions) -> Found:
    a, b, neither = (number_cell(row, f"winner_{who}") for who in ("model_a", "model_b", "tie"))
    if sorted((a, b, neither)) != [0, 0, 1]:
        raise Unusable("invalid_label", "exactly one of the three winner columns must be 1", "winner_model_a", a)
    first, second = (_arena_turns(row, column) for column in ("response_a", "response_b"))
    context = same_context(first, second, "response_a, response_b")
    return ordered(context, first[-1:], second[-1:], a - b, options, "winner_tie")


def _arena_turns(row: Row, column: str) -> tuple[dict[str, str], ...]:
    """Prompts and responses are JSON lists of the same length, one item a turn; a plain string is one turn."""
    prompts, responses = _texts(row, "prompt"), _texts(row, column)
    if not prompts or len(prompts) != len(responses):
        reason = f"prompt has {len(prompts)} turns, {column} has {len(responses)}"
        raise Unusable("context_mismatch", reason, column)
    turns = []
    for prompt, response in zip(prompts, responses, strict=True):
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return tuple(turns)


def _texts(row: Row, column: str) -> list[str]:
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = decoded_json(value, column)
    values = list_cell({column: value}, column) if isinstance(value, list | tuple) else [value]
    return [checked_text(item, column) for item in values]


@preference_format(
    name="ab-label",
    variant="alpaca-farm",
    code="F7",
    needs=(
        Column("instruction", is_text),
        Column("input", is_text, optional=True),
        Column("output_1", is_text),
        Column("output_2", is_text),
        Column("preference", is_number),
    ),
    unless=names_its_sides,
    columns="instruction, output_1, output_2: strings; input (joined by a line break): optional; preference: 1 or 2",
    polarity="the output that preference numbers, 1 or 2, is better",
)
def alpaca_farm(row: Row, options: ReadOptions) -> Found:
    better = label_cell(row, "preference", (1, 2))
    first, second = text_cell(row, "output_1"), text_cell(row, "output_2")
    return ordered(joined_instruction(row), first, second, 1 if better == 1 else -1, options, "preference")


# --- ab-label with the winner in words ------------------------------------------------------------------------------

_FIRST = frozenset(("model_a", "a", "response_a", "answer_a", "assistant_a", "conversation_a", "a>b", "a>>b"))
_SECOND = frozenset(("model_b", "b", "response_b", "answer_b", "assistant_b", "conversation_b", "b>a", "b>>a"))
_NEITHER = frozenset(
    ("both", "both_good", "bothgood", "both_bad", "bothbad", "both_equal", "neither", "none", "no_winner")
)  # fmt: skip
_NEITHER |= {"draw", "equal", "same", "a=b", "a==b", "b=a"}


def winner(row: Row, column: str = "winner") -> int:
    """1 where the first answer is better, -1 where the second is, 0 for a tie, in the words that public sets use."""
    said = text_cell(row, column)
    word = re.sub(r"[\s-]+", "_", said.strip().strip("[]").lower())
    word = re.sub(r"_is_(clearly_|slightly_|much_)?better$", "", word)
    if word in _FIRST:
        return 1
    if word in _SECOND:
        return -1
    if word in _NEITHER or word.startswith("tie"):
        return 0
    raise Unusable("invalid_label", f"{column} must be model_a, model_b or tie (or A>B, B>A, A=B)", column, said)


def _to_turn(row: Row, turns: tuple[Message, ...], column: str) -> tuple[Message, ...]:
    """A conversation up to the answer that `turn` numbers, counted from 1; the whole one where there is no `turn`."""
    if row.get("turn") is None:
        return turns
    wanted = label_cell(row, "turn", tuple(range(1, len(turns) + 1)))
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if wanted > len(answers):
        reason = f"turn {wanted} is judged, but {column} holds {len(answers)} answers"
        raise Unusable("invalid_label", reason, "turn", wanted)
    return turns[: answers[wanted - 1] + 1]


def _refuse_earlier_turns(row: Row, turns: tuple[Message, ...]) -> None:
    """Arena votes after a session's first come with the whole session: each side saw its own earlier answers."""
    session = decoded_json(row.get("full_conversation"), "full_conversation")
    asked = sum(turn["role"] == "user" for turn in turns)
    if isinstance(session, list | tuple) and len(session) > asked:
        reason = f"full_conversation holds {len(session)} questions, the judged conversation {asked}: what came before "
        raise Unusable("context_mismatch", reason + "differs between the two answers", "full_conversation")


@preference_format(
    name="ab-label",
    variant="winner",
    code="F7",
    needs=(
        Column("conversation_a", is_messages, also=("messages_a",)),
        Column("conversation_b", is_messages, also=("messages_b",)),
        Column("winner", is_text),
        Column("turn", is_number, optional=True),
        Column("full_conversation", either(items_with(user=present), is_text), optional=True),
    ),
    unless=names_its_sides,
    columns="conversation_a, conversation_b (or messages_*): message lists; winner: model_a, model_b or tie; "
    "turn: optional, the answer that is judged",
    polarity="winner names the better conversation",
    content=Content.CONVERSATION,
)
def arena_winner(row: Row, options: ReadOptions) -> Found:
    preference = winner(row)
    first, second = _judged(row)
    context = same_context(first, second, "conversation_a, conversation_b")
    return ordered(context, first[-1:], second[-1:], preference, options, "winner")


def _judged(row: Row) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Both conversations up to the judged answer."""
    found = []
    for column in ("conversation_a", "conversation_b"):
        turns = conversation(row, column)
        _refuse_earlier_turns(row, turns)
        found.append(ended_by_assistant(_to_turn(row, turns, column), column))
    return found[0], found[1]


@preference_format(
    name="ab-label",
    variant="text",
    code="F7",
    needs=(
        PROMPT,
        Column("response_a", is_text, also=("response_A", "response_1", "answer_a", "completion_a", "output_1")),
        Column("response_b", is_text, also=("response_B", "response_2", "answer_b", "completion_b", "output_2")),
        Column("winner", is_text, also=("label", "preference", "preferred")),
        Column("turn", is_number, optional=True),
    ),
    unless=names_its_sides,
    columns="prompt (or question), response_a, response_b (or response_A, response_1 …): strings; "
    "winner (or label): model_a, model_b or tie, or A>B, B>A, A=B",
    polarity="winner names the better response",
)
def ab_text(row: Row, options: ReadOptions) -> Found:
    prompt, first, second = (text_cell(row, column) for column in ("prompt", "response_a", "response_b"))
    if row.get("turn") not in (None, 1):
        raise Unusable("context_mismatch", "turn says a later answer is judged, and the row holds one", "turn")
    return ordered(prompt, first, second, winner(row), options, "winner")


@preference_format(
    name="ab-label",
    variant="chosen-model",
    code="F7",
    needs=(
        Column("conversation_a", is_messages),
        Column("conversation_b", is_messages),
        Column("model_a_name", is_text, also=("model_a",)),
        Column("model_b_name", is_text, also=("model_b",)),
        Column("chosen_model_name", is_text),
        Column("both_equal", is_label, optional=True),
        Column("turn", is_number, optional=True),
        Column("system_prompt_a", is_text, optional=True),
        Column("system_prompt_b", is_text, optional=True),
    ),
    unless=lambda shapes: names_its_sides(shapes) or "winner" in shapes,
    columns="conversation_a, conversation_b: message lists; model_a_name, model_b_name, chosen_model_name: strings; "
    "both_equal: optional boolean (compar:IA)",
    polarity="the conversation with the model that chosen_model_name names is better; both_equal is a tie",
    content=Content.CONVERSATION,
)
def chosen_model(row: Row, options: ReadOptions) -> Found:
    first, second = _judged(row)
    context = same_context(first, second, "conversation_a, conversation_b")
    systems = [optional_text(row, f"system_prompt_{side}") for side in "ab"]
    if systems[0] != systems[1]:
        raise Unusable("context_mismatch", "the two models had different system prompts", "system_prompt_a", systems[0])
    if systems[0]:
        context = ({"role": "system", "content": systems[0]}, *context)
    return ordered(context, first[-1:], second[-1:], _chosen_model(row), options, "both_equal")


def _chosen_model(row: Row) -> int:
    if row.get("both_equal") is not None and label_cell(row, "both_equal", (0, 1)):
        return 0
    chosen, names = text_cell(row, "chosen_model_name"), [text_cell(row, f"model_{who}_name") for who in "ab"]
    if names.count(chosen) != 1:
        reason = "chosen_model_name names both models" if chosen in names else "chosen_model_name names neither model"
        raise Unusable("invalid_label", reason, "chosen_model_name", chosen)
    return 1 if chosen == names[0] else -1


# --- summary --------------------------------------------------------------------------------------------------------


@preference_format(
    name="summary",
    code="F11",
    needs=(
        Column("info", struct_with(id=present)),
        Column("summaries", items_with(text=is_text)),
        Column("choice", is_number),
    ),
    unless=names_its_sides,
    columns="info: struct with post or article; summaries: list of two structs with text; choice: 0 or 1",
    polarity="choice numbers the better of the two summaries",
)
def summary(row: Row, options: ReadOptions) -> Found:
    better = label_cell(row, "choice", (0, 1))
    items = list_cell(row, "summaries")
    if len(items) != 2:
        raise Unusable("wrong_type", f"summaries holds {len(items)} items, not 2", "summaries")
    first, second = (checked_text(struct_item(item, "summaries").get("text"), "summaries") for item in items)
    prompt = _to_summarise(struct_item(row.get("info"), "info"))
    return ordered(prompt, first, second, 1 if better == 0 else -1, options, "choice")


def _to_summarise(info: Mapping[str, Any]) -> str:
    """Reddit posts and news articles are put differently, each ending where the summary begins."""
    if info.get("post") is not None:
        where, title = (checked_text(info.get(key) or "", f"info.{key}") for key in ("subreddit", "title"))
        post = checked_text(info["post"], "info.post")
        return f"SUBREDDIT: r/{where}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    if info.get("article") is None:
        keys = seen(json.dumps(sorted(map(str, info))), 80)
        raise Unusable("null_field", f"info holds neither post nor article (it holds {keys})", "info")
    return f"Article: {checked_text(info['article'], 'info.article')}\n\nTL;DR:"
