"""Formats that rank or score several answers to one prompt. They expand to pairs, all with one `group_id`.

best-worst   the best against the worst: one pair (best-of-n: every right answer against every wrong one)
all          every two answers that differ in score; equal ones are ties
adjacent     each answer against the next worse one
random       one pair drawn from `all`'s, by seed and prompt: the same wherever the row stands
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_score.data.column_types import Shape, Shapes, is_number, is_numbers, is_text, is_texts
from dpo_score.data.formats.base import Reading, nemo_messages, tie, wrapped_answer
from dpo_score.data.formats.chosen_rejected import Binding, sides, text_prompts
from dpo_score.data.formats.validate import (
    Row,
    checked_number,
    checked_text,
    list_cell,
    number_cell,
    struct_item,
    text_cell,
)
from dpo_score.data.types import NOWHERE, Pair, Problem, Text, Unusable

Found = Iterable[Pair | Problem]


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer with its score; a higher score is better."""

    answer: Text
    score: float


def expand(prompt: Text, answers: Sequence[Scored], how: Reading, column: str) -> Found:
    """The pairs that `how.pairing` asks for, best first."""
    if len(answers) < 2:
        raise Unusable("null_field", f"{column} holds {len(answers)} answers: two are needed", column)
    group = group_id(prompt, answers)
    ranked = sorted(answers, key=lambda item: -item.score)
    for better, worse in _PAIRINGS[how.pairing](ranked, how.seed, group):
        if better.score == worse.score:
            found = tie(prompt, better.answer, worse.answer, how, column)
        else:
            found = Pair(NOWHERE, prompt, better.answer, worse.answer)
        yield replace(found, extra={"group_id": group}) if isinstance(found, Pair) else found


def group_id(prompt: Text, answers: Sequence[Scored]) -> str:
    """blake2b-64 of the prompt and its answers, in any order: stable across shuffles and re-exports."""
    digest = hashlib.blake2b(repr(prompt).encode("utf-8", "surrogatepass"), digest_size=8)
    for text in sorted(repr(item.answer) for item in answers):
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


Pairs = Iterable[tuple[Scored, Scored]]


def _best_worst(ranked: Sequence[Scored], seed: int, group: str) -> Pairs:
    return [(ranked[0], ranked[-1])]


def _all(ranked: Sequence[Scored], seed: int, group: str) -> Pairs:
    return itertools.combinations(ranked, 2)


def _adjacent(ranked: Sequence[Scored], seed: int, group: str) -> Pairs:
    return itertools.pairwise(ranked)


def _random(ranked: Sequence[Scored], seed: int, group: str) -> Pairs:
    different = [pair for pair in itertools.combinations(ranked, 2) if pair[0].score != pair[1].score]
    return [random.Random(f"{seed}:{group}").choice(different or [(ranked[0], ranked[-1])])]


_PAIRINGS: dict[str, Callable[[Sequence[Scored], int, str], Pairs]] = {
    "best-worst": _best_worst,
    "all": _all,
    "adjacent": _adjacent,
    "random": _random,
}


def _item_fields(shapes: Shapes, column: str) -> dict[str, Shape]:
    shape = shapes.get(column)
    return dict(shape.item.fields) if shape is not None and shape.item is not None and not sides(shapes) else {}


# --- F8 ranked: Nectar's answers --------------------------------------------------------------------------------


def bind_nectar(shapes: Shapes) -> Binding | None:
    fields, prompts = _item_fields(shapes, "answers"), text_prompts(shapes)
    fits = is_text(fields.get("answer")) and is_number(fields.get("rank"))
    return {"prompt": prompts[0], "answers": "answers"} if fits and prompts else None


def read_nectar(row: Row, how: Reading) -> Found:
    """Rank 1 is the best, so the score is the rank's negative."""
    items = [struct_item(item, "answers") for item in list_cell(row, "answers")]
    answers = [
        Scored(checked_text(item.get("answer"), "answers"), -checked_number(item.get("rank"), "answers.rank", "rank"))
        for item in items
    ]
    return expand(text_cell(row, "prompt"), answers, how, "answers")


# --- F8 ranked: UltraFeedback's completions ---------------------------------------------------------------------

COMPLETION_SCORES = ("overall_score", "fine-grained_score", "score", "rating")


def bind_completions(shapes: Shapes) -> Binding | None:
    fields, prompts = _item_fields(shapes, "completions"), text_prompts(shapes)
    fits = is_text(fields.get("response")) and any(n in fields for n in COMPLETION_SCORES)
    return {"prompt": prompts[0], "completions": "completions"} if fits and prompts else None


def read_completions(row: Row, how: Reading) -> Found:
    """The first of COMPLETION_SCORES that every completion has."""
    items = [struct_item(item, "completions") for item in list_cell(row, "completions")]
    name = next((n for n in COMPLETION_SCORES if items and all(item.get(n) is not None for item in items)), None)
    if name is None:
        raise Unusable("null_field", "no score that every completion has", "completions")
    answers = [
        Scored(checked_text(item.get("response"), "completions"), checked_number(item[name], f"completions.{name}"))
        for item in items
    ]
    return expand(text_cell(row, "prompt"), answers, how, f"completions.{name}")


# --- F8 ranked: parallel lists ----------------------------------------------------------------------------------

LIST_ANSWERS = ("responses", "completions", "generations", "answers")
LIST_SCORES = ("scores", "ratings", "rewards", "rating")


def bind_lists(shapes: Shapes) -> Binding | None:
    answers = [n for n in LIST_ANSWERS if is_texts(shapes.get(n))]
    scores = [n for n in LIST_SCORES if is_numbers(shapes.get(n))]
    prompts = text_prompts(shapes)
    if sides(shapes) or not (answers and scores and prompts):
        return None
    return {"prompt": prompts[0], "answers": answers[0], "scores": scores[0]}


def read_lists(row: Row, how: Reading) -> Found:
    answers, scores = list_cell(row, "answers"), list_cell(row, "scores")
    if len(answers) != len(scores):
        reason = f"{len(answers)} answers, but {len(scores)} scores"
        raise Unusable("invalid_label", reason, "scores", scores)
    items = [
        Scored(checked_text(a, "answers"), checked_number(s, "scores")) for a, s in zip(answers, scores, strict=True)
    ]
    return expand(text_cell(row, "prompt"), items, how, "scores")


# --- F8 ranked: HelpSteer2, two consecutive rows a prompt -------------------------------------------------------


def bind_two_rows(shapes: Shapes) -> Binding | None:
    good = is_text(shapes.get("prompt")) and is_text(shapes.get("response")) and is_number(shapes.get("helpfulness"))
    return {n: n for n in ("prompt", "response", "helpfulness")} if good and not sides(shapes) else None


def read_two_rows(row: Row, how: Reading) -> Found:
    """`row["rows"]` holds two consecutive rows of the file."""
    rows: list[Any] = list_cell(row, "rows")
    prompts = [text_cell(item, "prompt") for item in rows]
    if len(rows) != 2 or prompts[0] != prompts[1]:
        raise Unusable("context_mismatch", "two consecutive rows must hold one prompt", "prompt", prompts[-1])
    answers = [Scored(wrapped_answer(text_cell(i, "response")), number_cell(i, "helpfulness")) for i in rows]
    return expand(nemo_messages(prompts[0]), answers, how, "helpfulness")


# --- F9 best-of-n -----------------------------------------------------------------------------------------------


def read_best_of_n(row: Row, how: Reading) -> Found:
    """Right answers score 1, wrong ones 0; two right answers, or two wrong ones, are never compared."""
    prompt = text_cell(row, "prompt")
    right = [Scored(checked_text(text, "chosen"), 1.0) for text in list_cell(row, "chosen")]
    wrong = [Scored(checked_text(text, "rejected"), 0.0) for text in list_cell(row, "rejected")]
    if not right or not wrong:
        raise Unusable("null_field", "chosen and rejected must hold an answer each", "chosen" if wrong else "rejected")
    group = group_id(prompt, [*right, *wrong])
    pairs = list(itertools.product(right, wrong))
    if how.pairing == "random":
        pairs = [random.Random(f"{how.seed}:{group}").choice(pairs)]
    elif how.pairing == "adjacent":
        pairs = [(right[-1], wrong[0])]
    extra = {"group_id": group, "num_correct": len(right)}
    return [Pair(NOWHERE, prompt, a.answer, b.answer, extra=extra) for a, b in pairs]
