"""Formats that rank or score several answers to one prompt. They expand to pairs, all with one `group_id`.

best-worst   the best against the worst: one pair (best-of-n: every right answer against every wrong one)
all          every two answers that differ in score; equal ones are ties
adjacent     each answer against the next worse one
random       one pair drawn from `all`'s, by seed and prompt: the same wherever the row is
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_score.data.column_types import (
    Shapes,
    is_messages,
    is_number,
    is_numbers,
    is_text,
    is_texts,
    item_fields,
    items_with,
    struct_with,
)
from dpo_score.data.formats.base import (
    Answers,
    Column,
    Content,
    Found,
    ReadOptions,
    assistant_answer,
    pair,
    preference_format,
    tie,
)
from dpo_score.data.formats.cells import (
    Row,
    answer,
    checked_number,
    checked_text,
    conversation,
    list_cell,
    number_cell,
    struct_item,
    text_cell,
    text_inside,
)
from dpo_score.data.formats.chosen_rejected import PROMPT, is_answer, names_its_sides
from dpo_score.data.formats.transcripts import nemo_messages
from dpo_score.data.types import Pair, Problem, Text, Unusable


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer with its score; a higher score is better."""

    answer: Text
    score: float


def expand(prompt: Text, answers: Sequence[Scored], options: ReadOptions, column: str) -> Found:
    """The pairs that `options.pairing` asks for, best first."""
    if len(answers) < 2:
        raise Unusable("null_field", f"{column} holds {len(answers)} answers: two are needed", column)
    group = group_id(prompt, answers)
    ranked = sorted(answers, key=lambda item: -item.score)
    for better, worse in _paired(ranked, options, group):
        if better.score == worse.score:
            found = tie(prompt, better.answer, worse.answer, options, column)
        else:
            found = pair(prompt, better.answer, worse.answer)
        yield replace(found, extra={"group_id": group}) if isinstance(found, Pair) else found


def group_id(prompt: Text, answers: Sequence[Scored]) -> str:
    """blake2b-64 of the prompt and its answers, in any order: stable across shuffles and re-exports."""
    digest = hashlib.blake2b(repr(prompt).encode("utf-8", "surrogatepass"), digest_size=8)
    for text in sorted(repr(item.answer) for item in answers):
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _paired(ranked: Sequence[Scored], options: ReadOptions, group: str) -> Iterable[tuple[Scored, Scored]]:
    """`ranked`: best first."""
    if options.pairing == "all":
        return itertools.combinations(ranked, 2)
    if options.pairing == "adjacent":
        return itertools.pairwise(ranked)
    if options.pairing == "random":
        different = [two for two in itertools.combinations(ranked, 2) if two[0].score != two[1].score]
        return [random.Random(f"{options.seed}:{group}").choice(different or [(ranked[0], ranked[-1])])]
    return [(ranked[0], ranked[-1])]


# --- ranked: lists of structs ---------------------------------------------------------------------------------------


@preference_format(
    name="ranked",
    variant="answers",
    code="F8",
    needs=(PROMPT, Column("answers", items_with(answer=is_text, rank=is_number))),
    unless=names_its_sides,
    columns="prompt: string; answers: list of structs with answer and rank",
    polarity="the answer with the lower rank is better: rank 1 is the best",
    answers=Answers.RANKED,
)
def nectar(row: Row, options: ReadOptions) -> Found:
    """Rank 1 is the best, so the score is the rank's negative."""
    items = [struct_item(item, "answers") for item in list_cell(row, "answers")]
    answers = [
        Scored(checked_text(item.get("answer"), "answers"), -checked_number(item.get("rank"), "answers.rank", "rank"))
        for item in items
    ]
    return expand(text_cell(row, "prompt"), answers, options, "answers")


COMPLETION_SCORES = ("fine-grained_score", "overall_score", "score", "rating")
"""UltraFeedback's fine-grained_score comes first: its overall_score is 10 in some rows whose critique says 1."""


def has_scores(shapes: Shapes) -> bool:
    return not item_fields(shapes.get("completions")).keys().isdisjoint(COMPLETION_SCORES)


@preference_format(
    name="ranked",
    variant="completions",
    code="F8",
    needs=(PROMPT, Column("completions", items_with(response=is_text))),
    unless=lambda shapes: names_its_sides(shapes) or not has_scores(shapes),
    columns="instruction or prompt: string; completions: list of structs with response and fine-grained_score or "
    "overall_score",
    polarity="the completion with the higher fine-grained_score (else overall_score, score, rating) is better",
    answers=Answers.RANKED,
    version=2,
)
def completions(row: Row, options: ReadOptions) -> Found:
    """The first of COMPLETION_SCORES that every completion has."""
    items = [struct_item(item, "completions") for item in list_cell(row, "completions")]
    name = next((n for n in COMPLETION_SCORES if items and all(item.get(n) is not None for item in items)), None)
    if name is None:
        raise Unusable("null_field", "no score that every completion has", "completions")
    answers = [
        Scored(checked_text(item.get("response"), "completions"), checked_number(item[name], f"completions.{name}"))
        for item in items
    ]
    return expand(text_cell(row, "prompt"), answers, options, f"completions.{name}")


@preference_format(
    name="ranked",
    variant="ranked-completions",
    code="F8",
    needs=(
        Column("context", is_answer, also=("prompt",)),
        Column("completions", items_with(rank=is_number, completion=is_answer)),
    ),
    unless=names_its_sides,
    columns="context: message list or string; completions: list of structs with rank and completion (NeMo-RL)",
    polarity="the completion with the lower rank is better: rank 0 is better than rank 1",
    content=Content.CONVERSATION,
    answers=Answers.RANKED,
)
def ranked_completions(row: Row, options: ReadOptions) -> Found:
    items = [struct_item(item, "completions") for item in list_cell(row, "completions")]
    answers = [
        Scored(answer(item, "completion"), -checked_number(item.get("rank"), "completions.rank", "rank"))
        for item in items
    ]
    given = row.get("context")
    prompt = ({"role": "user", "content": checked_text(given, "context")},) if isinstance(given, str) else None
    return expand(prompt or conversation(row, "context"), answers, options, "completions.rank")


# --- ranked: parallel lists -----------------------------------------------------------------------------------------


@preference_format(
    name="ranked",
    variant="lists",
    code="F8",
    needs=(
        PROMPT,
        Column("answers", is_texts, also=("responses", "completions", "generations")),
        Column("scores", is_numbers, also=("ratings", "rewards", "rating")),
    ),
    unless=names_its_sides,
    columns="prompt: string; responses (completions, generations, answers): strings; scores (ratings, rewards): "
    "numbers",
    polarity="the answer with the higher score is better",
    answers=Answers.RANKED,
    beside=("generation_prompt", "raw_generation_responses", "messages", "labelling_prompt"),
)
def lists(row: Row, options: ReadOptions) -> Found:
    answers, scores = list_cell(row, "answers"), list_cell(row, "scores")
    if len(answers) != len(scores):
        reason = f"{len(answers)} answers, but {len(scores)} scores"
        raise Unusable("invalid_label", reason, "scores", scores)
    items = [
        Scored(checked_text(text, "answers"), checked_number(score, "scores"))
        for text, score in zip(answers, scores, strict=True)
    ]
    return expand(text_cell(row, "prompt"), items, options, "scores")


# --- ranked: rows of one prompt -------------------------------------------------------------------------------------


@preference_format(
    name="ranked",
    variant="two-rows",
    code="F8",
    needs=(Column("prompt", is_text), Column("response", is_text), Column("helpfulness", is_number)),
    unless=names_its_sides,
    columns="prompt, response: strings; helpfulness: number; two or more rows for each prompt, wherever they are",
    polarity="of the rows of one prompt those with the higher helpfulness are better; equal ones are a tie",
    content=Content.CONVERSATION,
    answers=Answers.RANKED,
    grouped_by="prompt",
    version=2,
)
def rows_of_prompt(row: Row, options: ReadOptions) -> Found:
    """`row["rows"]` holds all rows of the set that have one prompt. A bad row leaves the others alone."""
    rows: list[Any] = list_cell(row, "rows")
    prompt = text_cell(rows[0], "prompt")
    if len(rows) < 2:
        raise Unusable("context_mismatch", "no other row of the set has this prompt", "prompt", prompt)
    answers: list[Scored] = []
    problems: list[Problem] = []
    for item in rows:
        try:
            answers.append(Scored(assistant_answer(text_cell(item, "response")), number_cell(item, "helpfulness")))
        except Unusable as unusable:
            problems.append(unusable.problem)
    pairs = expand(nemo_messages(prompt), answers, options, "helpfulness") if len(answers) > 1 else ()
    return [*pairs, *problems]


# --- best-of-n ------------------------------------------------------------------------------------------------------


@preference_format(
    name="best-of-n",
    code="F9",
    needs=(PROMPT, Column("chosen", is_texts), Column("rejected", is_texts)),
    columns="prompt: string; chosen, rejected: lists of strings",
    polarity="every answer in chosen is better than every answer in rejected",
    answers=Answers.RIGHT_AND_WRONG,
)
def best_of_n(row: Row, options: ReadOptions) -> Found:
    right, wrong = ([checked_text(text, side) for text in list_cell(row, side)] for side in ("chosen", "rejected"))
    if not right or not wrong:
        raise Unusable("null_field", "chosen and rejected must hold an answer each", "chosen" if wrong else "rejected")
    return _right_against_wrong(text_cell(row, "prompt"), right, wrong, options)


def _right_against_wrong(prompt: Text, right: Sequence[Text], wrong: Sequence[Text], options: ReadOptions) -> Found:
    """Every right answer against every wrong one, or as `options.pairing` says; never two right or two wrong ones."""
    group = group_id(prompt, [*(Scored(text, 1.0) for text in right), *(Scored(text, 0.0) for text in wrong)])
    pairs = list(itertools.product(right, wrong))
    if options.pairing == "random":
        pairs = [random.Random(f"{options.seed}:{group}").choice(pairs)]
    elif options.pairing == "adjacent":
        pairs = [(right[-1], wrong[0])]
    extra = {"group_id": group, "num_correct": len(right)}
    return [pair(prompt, better, worse, extra=extra) for better, worse in pairs]


@preference_format(
    name="best-of-n",
    variant="losers",
    code="F9",
    needs=(
        Column("conversation_input", is_messages, also=("prompt",)),
        Column("bon_best", struct_with(answer=is_text)),
        Column("loser_list", items_with(answer=is_text)),
    ),
    columns="conversation_input: message list; bon_best: struct with answer; loser_list: list of structs with answer "
    "(RMB, best of n)",
    polarity="bon_best is better than every answer in loser_list",
    content=Content.CONVERSATION,
    answers=Answers.RIGHT_AND_WRONG,
)
def best_and_losers(row: Row, options: ReadOptions) -> Found:
    best = assistant_answer(text_inside(row, "bon_best", "answer"))
    losers = [
        assistant_answer(checked_text(struct_item(item, "loser_list").get("answer"), "loser_list"))
        for item in list_cell(row, "loser_list")
    ]
    if not losers:
        raise Unusable("null_field", "loser_list holds no answer", "loser_list")
    return _right_against_wrong(conversation(row, "conversation_input"), [best], losers, options)
