"""Formats whose two answers stand in neutral columns and whose label says which is better.

Polarity is where such readers go wrong, so each states it once, in `formats.TABLE`, and reads it through
`comparison.ordered`: positive = the first answer is better.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_score.data.column_types import Shapes, is_messages, is_number, is_text
from dpo_score.data.formats.base import Reading, nemo_messages, ordered, same_context, wrapped_answer
from dpo_score.data.formats.chosen_rejected import Binding, sides
from dpo_score.data.formats.validate import (
    Row,
    answer,
    checked_text,
    conversation,
    decoded_json,
    label_cell,
    list_cell,
    number_cell,
    struct_item,
    text_cell,
)
from dpo_score.data.types import Pair, Problem, Unusable
from dpo_score.escape import seen

Found = Iterable[Pair | Problem]


def _columns(shapes: Shapes, *names: str, text: Iterable[str] = (), numbers: Iterable[str] = ()) -> Binding | None:
    """All of these columns, each of its kind, in a set that does not name its sides itself."""
    fits = all(is_text(shapes.get(n)) for n in text) and all(is_number(shapes.get(n)) for n in numbers)
    wanted = (*names, *text, *numbers)
    return {n: n for n in wanted} if fits and not sides(shapes) and all(n in shapes for n in wanted) else None


# --- F5 signed-preference ---------------------------------------------------------------------------------------


def bind_helpsteer2_preference(shapes: Shapes) -> Binding | None:
    return _columns(shapes, text=("prompt", "response_1", "response_2"), numbers=("preference_strength",))


def read_helpsteer2_preference(row: Row, how: Reading) -> Found:
    strength = label_cell(row, "preference_strength", (-3, -2, -1, 0, 1, 2, 3))
    prompt = nemo_messages(text_cell(row, "prompt"))
    first, second = (wrapped_answer(text_cell(row, c)) for c in ("response_1", "response_2"))
    return ordered(prompt, first, second, -strength, how, "preference_strength")


def bind_helpsteer3(shapes: Shapes) -> Binding | None:
    if not is_messages(shapes.get("context")):
        return None
    return _columns(shapes, "context", text=("response1", "response2"), numbers=("overall_preference",))


def read_helpsteer3(row: Row, how: Reading) -> Found:
    strength = label_cell(row, "overall_preference", (-3, -2, -1, 0, 1, 2, 3))
    first, second = (wrapped_answer(text_cell(row, c)) for c in ("response1", "response2"))
    return ordered(conversation(row, "context"), first, second, -strength, how, "overall_preference")


# --- F6 better-id -----------------------------------------------------------------------------------------------


def bind_better_id(shapes: Shapes) -> Binding | None:
    labels = [n for n in ("better_response_id", "safer_response_id") if is_number(shapes.get(n))]
    return _columns(shapes, text=("prompt", "response_0", "response_1"), numbers=labels) if labels else None


def read_better_id(row: Row, how: Reading) -> Found:
    column = f"{how.preference or ('better' if 'better_response_id' in row else 'safer')}_response_id"
    better = label_cell(row, column, (0, 1))
    first, second = text_cell(row, "response_0"), text_cell(row, "response_1")
    return ordered(text_cell(row, "prompt"), first, second, 1 if better == 0 else -1, how, column)


# --- F7 ab-label ------------------------------------------------------------------------------------------------


def bind_shp(shapes: Shapes) -> Binding | None:
    return _columns(shapes, text=("history", "human_ref_A", "human_ref_B"), numbers=("labels",))


def read_shp(row: Row, how: Reading) -> Found:
    first_is_better = label_cell(row, "labels", (0, 1)) == 1
    first, second = text_cell(row, "human_ref_A"), text_cell(row, "human_ref_B")
    return ordered(text_cell(row, "history"), first, second, 1 if first_is_better else -1, how, "labels")


def bind_webgpt(shapes: Shapes) -> Binding | None:
    question = shapes.get("question")
    if question is None or not (is_text(question) or is_text(question.fields.get("full_text"))):
        return None
    return _columns(shapes, "question", text=("answer_0", "answer_1"), numbers=("score_0", "score_1"))


def read_webgpt(row: Row, how: Reading) -> Found:
    question = row.get("question")
    text = question.get("full_text") if isinstance(question, Mapping) else question
    preference = number_cell(row, "score_0") - number_cell(row, "score_1")
    prompt = checked_text(text, "question")
    return ordered(prompt, text_cell(row, "answer_0"), text_cell(row, "answer_1"), preference, how, "score_0, score_1")


def bind_arena_one_hot(shapes: Shapes) -> Binding | None:
    winners = ("winner_model_a", "winner_model_b", "winner_tie")
    return _columns(shapes, *winners, text=("prompt", "response_a", "response_b"))


def read_arena_one_hot(row: Row, how: Reading) -> Found:
    a, b, neither = (number_cell(row, f"winner_{who}") for who in ("model_a", "model_b", "tie"))
    if sorted((a, b, neither)) != [0, 0, 1]:
        raise Unusable("invalid_label", "exactly one of the three winner columns must be 1", "winner_model_a", a)
    first, second = (_arena_turns(row, column) for column in ("response_a", "response_b"))
    context = same_context(first, second, "response_a, response_b")
    return ordered(context, first[-1:], second[-1:], a - b, how, "winner_tie")


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


def bind_arena_winner(shapes: Shapes) -> Binding | None:
    if not (is_messages(shapes.get("conversation_a")) and is_messages(shapes.get("conversation_b"))):
        return None
    return _columns(shapes, "conversation_a", "conversation_b", text=("winner",))


def read_arena_winner(row: Row, how: Reading) -> Found:
    preference = _winner(row, "winner")
    first, second = answer(row, "conversation_a"), answer(row, "conversation_b")
    context = same_context(first, second, "conversation_a, conversation_b")
    return ordered(context, first[-1:], second[-1:], preference, how, "winner")


def bind_ab_text(shapes: Shapes) -> Binding | None:
    return _columns(shapes, text=("prompt", "response_a", "response_b", "winner"))


def read_ab_text(row: Row, how: Reading) -> Found:
    prompt, first, second = (text_cell(row, c) for c in ("prompt", "response_a", "response_b"))
    return ordered(prompt, first, second, _winner(row, "winner"), how, "winner")


def _winner(row: Row, column: str) -> int:
    value = text_cell(row, column).strip().lower()
    if value in ("model_a", "a", "response_a"):
        return 1
    if value in ("model_b", "b", "response_b"):
        return -1
    if value.startswith("tie") or value in ("both_bad", "bothbad"):
        return 0
    raise Unusable("invalid_label", f"{column} must be model_a, model_b or tie", column, value)


# --- F11 summary ------------------------------------------------------------------------------------------------


def bind_summary(shapes: Shapes) -> Binding | None:
    summaries, info = shapes.get("summaries"), shapes.get("info")
    item = summaries.item if summaries is not None else None
    if item is None or not is_text(item.fields.get("text")) or info is None or info.kind != "struct":
        return None
    return _columns(shapes, "info", "summaries", numbers=("choice",))


def read_summary(row: Row, how: Reading) -> Found:
    better = label_cell(row, "choice", (0, 1))
    items = list_cell(row, "summaries")
    if len(items) != 2:
        raise Unusable("wrong_type", f"summaries holds {len(items)} items, not 2", "summaries")
    first, second = (checked_text(struct_item(item, "summaries").get("text"), "summaries") for item in items)
    prompt = _to_summarise(struct_item(row.get("info"), "info"))
    return ordered(prompt, first, second, 1 if better == 0 else -1, how, "choice")


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
