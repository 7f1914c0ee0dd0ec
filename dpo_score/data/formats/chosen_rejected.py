"""Formats that name the better side themselves: columns (or structs) called chosen and rejected, or preferred.

Each format is a `bind` (which columns, or None if the schema is another one's) and a `read` (row → comparisons).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from dpo_score.data.column_types import Shape, Shapes, is_message, is_messages, is_text, is_texts
from dpo_score.data.formats.base import (
    ASSISTANT,
    Reading,
    from_conversations,
    wrapped_answer,
    wrapped_user,
)
from dpo_score.data.formats.validate import Row, answer, conversation, optional_text, struct_item, text_cell
from dpo_score.data.types import NOWHERE, Message, Pair, Unusable

Binding: TypeAlias = dict[str, str]
"""Canonical name a reader uses → the column that holds it."""

PROMPT_NAMES = ("prompt", "question", "instruction", "input")
SYSTEM_NAMES = ("system", "system_prompt")


def text_prompts(shapes: Shapes) -> list[str]:
    """Columns that can be the prompt, best name first."""
    return [name for name in PROMPT_NAMES if is_text(shapes.get(name))]


def sides(shapes: Shapes) -> Binding | None:
    """The columns of the two sides, under either of their usual names."""
    for chosen, rejected in (("chosen", "rejected"), ("chosen_response", "rejected_response")):
        if chosen in shapes and rejected in shapes:
            return {"chosen": chosen, "rejected": rejected}
    return None


def optional(shapes: Shapes, **names: Iterable[str]) -> Binding:
    """Those of `names` that are there as text, first match each."""
    found = {key: next((n for n in options if is_text(shapes.get(n))), None) for key, options in names.items()}
    return {key: name for key, name in found.items() if name is not None}


def _both(shapes: Shapes, binding: Binding | None, *tests: Any) -> bool:
    """Whether both sides pass one of the tests."""
    if binding is None:
        return False
    return all(any(test(shapes[binding[side]]) for test in tests) for side in ("chosen", "rejected"))


# --- F1 pair-text -----------------------------------------------------------------------------------------------


def bind_pair_text(shapes: Shapes) -> Binding | None:
    found, prompts = sides(shapes), text_prompts(shapes)
    if found is None or not prompts or not _both(shapes, found, is_text):
        return None
    return {"prompt": prompts[0], **found, **optional(shapes, system=SYSTEM_NAMES)}


def read_pair_text(row: Row, how: Reading) -> Iterable[Pair]:
    """With a system column the row is a conversation; without one it is text, as TRL reads it."""
    prompt, chosen, rejected = (text_cell(row, column) for column in ("prompt", "chosen", "rejected"))
    if "system" not in row:
        return [Pair(NOWHERE, prompt, chosen, rejected)]
    context = wrapped_user(prompt, optional_text(row, "system"))
    return [Pair(NOWHERE, context, wrapped_answer(chosen), wrapped_answer(rejected))]


# --- F2 hh-transcript, and two whole texts without its markers --------------------------------------------------


def bind_pair_text_implicit(shapes: Shapes) -> Binding | None:
    found = sides(shapes)
    if found is None or text_prompts(shapes) or not _both(shapes, found, is_text):
        return None
    return found if not is_messages(shapes.get("prompt")) else None


def read_pair_text_implicit(row: Row, how: Reading) -> Iterable[Pair]:
    return [Pair(NOWHERE, "", text_cell(row, "chosen"), text_cell(row, "rejected"), implicit=True)]


def read_hh_transcript(row: Row, how: Reading) -> Iterable[Pair]:
    chosen, rejected = text_cell(row, "chosen"), text_cell(row, "rejected")
    for column, text in (("chosen", chosen), ("rejected", rejected)):
        if ASSISTANT not in text:
            raise Unusable("not_hh_transcript", f"{column} holds no {ASSISTANT!r}", column, text)
    return [Pair(NOWHERE, "", chosen, rejected, implicit=True)]


# --- F3 messages-full: both sides are whole conversations -------------------------------------------------------


def bind_messages_full(shapes: Shapes) -> Binding | None:
    found = sides(shapes)
    if not _both(shapes, found, is_messages) or is_messages(shapes.get("prompt")) or _has_turns(shapes):
        return None
    prompts = text_prompts(shapes)
    return {**(found or {}), **({"prompt": prompts[0]} if prompts else {})}


def read_messages_full(row: Row, how: Reading) -> Iterable[Pair]:
    """The context is what stands before the answer; a prompt column serves only where there is none."""
    chosen, rejected = answer(row, "chosen"), answer(row, "rejected")
    if len(chosen) == len(rejected) == 1 and row.get("prompt"):
        return [Pair(NOWHERE, wrapped_user(text_cell(row, "prompt")), chosen, rejected)]
    return [from_conversations(chosen, rejected)]


# --- F4 messages-explicit ---------------------------------------------------------------------------------------


def bind_messages_explicit(shapes: Shapes) -> Binding | None:
    found = sides(shapes)
    if not is_messages(shapes.get("prompt")) or not _both(shapes, found, is_messages, is_message, is_text):
        return None
    return {"prompt": "prompt", **(found or {})}


def read_messages_explicit(row: Row, how: Reading) -> Iterable[Pair]:
    prompt = conversation(row, "prompt")
    chosen, rejected = answer(row, "chosen"), answer(row, "rejected")
    return [Pair(NOWHERE, prompt, _after(prompt, chosen), _after(prompt, rejected))]


def _after(prompt: tuple[Message, ...], side: tuple[Message, ...]) -> tuple[Message, ...]:
    """A side that repeats the whole prompt before its answer is cut to the answer."""
    repeats = len(side) > len(prompt) and side[: len(prompt)] == prompt
    return side[len(prompt) :] if repeats else side


# --- F4b openai -------------------------------------------------------------------------------------------------


def bind_openai(shapes: Shapes) -> Binding | None:
    names = ("input", "preferred_output", "non_preferred_output")
    inner = shapes["input"].fields if "input" in shapes else {}
    good = all(is_messages(shapes.get(n)) or is_message(shapes.get(n)) for n in names[1:])
    return {name: name for name in names} if good and is_messages(inner.get("messages")) else None


def read_openai(row: Row, how: Reading) -> Iterable[Pair]:
    given = struct_item(row.get("input"), "input")
    prompt = conversation(given, "messages")
    chosen, rejected = answer(row, "preferred_output"), answer(row, "non_preferred_output")
    return [Pair(NOWHERE, prompt, chosen, rejected, tools=given.get("tools"))]


# --- F9 best-of-n -----------------------------------------------------------------------------------------------


def bind_best_of_n(shapes: Shapes) -> Binding | None:
    found, prompts = sides(shapes), text_prompts(shapes)
    return {"prompt": prompts[0], **(found or {})} if prompts and _both(shapes, found, is_texts) else None


# --- F10 sharegpt -----------------------------------------------------------------------------------------------


def _has_turns(shapes: Shapes) -> bool:
    return is_messages(shapes.get("conversations"))


def bind_sharegpt(shapes: Shapes) -> Binding | None:
    found = sides(shapes)
    if not _has_turns(shapes) or is_messages(shapes.get("prompt")) or not _both(shapes, found, is_message, is_messages):
        return None
    return {"conversations": "conversations", **(found or {}), **optional(shapes, system=SYSTEM_NAMES)}


def read_sharegpt(row: Row, how: Reading) -> Iterable[Pair]:
    prompt = conversation(row, "conversations")
    system = optional_text(row, "system")
    if system and prompt[0]["role"] != "system":
        prompt = ({"role": "system", "content": system}, *prompt)
    return [Pair(NOWHERE, prompt, answer(row, "chosen"), answer(row, "rejected"))]


def unpaired(shapes: Shapes) -> bool:
    """The KTO form: one completion and a boolean."""
    label: Shape | None = shapes.get("label")
    return "completion" in shapes and label is not None and label.kind in ("bool", "int") and "chosen" not in shapes
