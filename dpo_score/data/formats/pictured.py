"""Formats that only sets about pictures have: benchmarks with categories, ratings by aspect.

Their pictures are in the column that every format may have beside its own (`PICTURES` in detect.py); here are the
answers and what says which is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dpo_score.data.column_types import Shape, Shapes, either, is_number, is_numbers, is_text, is_texts, item_fields
from dpo_score.data.formats.base import Answers, Column, Found, ReadOptions, ordered, preference_format
from dpo_score.data.formats.cells import (
    Row,
    checked_number,
    checked_text,
    list_cell,
    optional_text,
    struct_item,
    text_cell,
)
from dpo_score.data.formats.chosen_rejected import PROMPT, names_its_sides
from dpo_score.data.formats.ranked import Scored, expand, has_scores
from dpo_score.data.types import Pair, Problem, Unusable

GROUPS = {
    "RLAIF": "hallucination",
    "RLHF": "hallucination",
    "mathverse": "reasoning",
    "mmmu": "reasoning",
    "wildvision": "general",
}
"""VL-RewardBench's three groups by the beginning of an id; ids that begin otherwise are VLFeedback's: general."""


def _with_subset(found: Pair | Problem, subset: str) -> Pair | Problem:
    return replace(found, extra={**found.extra, "subset": subset}) if isinstance(found, Pair) and subset else found


@preference_format(
    name="ranked",
    variant="human-ranking",
    code="F8",
    needs=(
        PROMPT,
        Column("response", is_texts),
        Column("human_ranking", is_numbers),
        Column("id", is_text, optional=True),
    ),
    unless=names_its_sides,
    columns="query: string; response: list of strings; human_ranking: their ranks; id, optional (VL-RewardBench)",
    polarity="the response with the lower human_ranking is better: rank 0 is the best",
    answers=Answers.RANKED,
    beside=("judges", "models", "rationale", "ground_truth"),
    categories=True,
)
def human_ranking(row: Row, options: ReadOptions) -> Found:
    texts, ranks = list_cell(row, "response"), list_cell(row, "human_ranking")
    if len(texts) != len(ranks):
        raise Unusable("invalid_label", f"{len(texts)} responses, but {len(ranks)} ranks", "human_ranking", ranks)
    answers = [
        Scored(checked_text(text, "response"), -checked_number(rank, "human_ranking", "rank"))
        for text, rank in zip(texts, ranks, strict=True)
    ]
    begun = optional_text(row, "id").replace("_", "-").split("-")[0]
    subset = GROUPS.get(begun, "general") if begun else ""
    found = expand(text_cell(row, "prompt"), answers, options, "human_ranking")
    return [_with_subset(item, subset) for item in found]


@preference_format(
    name="ab-label",
    variant="multimodal-rewardbench",
    code="F7",
    needs=(
        Column("Text", is_text),
        Column("Output1", is_text),
        Column("Output2", is_text),
        Column("Better", is_text),
        Column("Category", is_text, optional=True),
        Column("Meta", lambda shape: shape is not None and shape.kind == "struct", optional=True),
        Column("ID", is_text, optional=True),
    ),
    unless=names_its_sides,
    columns="Text, Output1, Output2: strings; Better: Output1 or Output2; Category or Meta.Category, ID, optional "
    "(Multimodal RewardBench)",
    polarity="the output that Better names is better",
    beside=("Label",),
    categories=True,
)
def multimodal_rewardbench(row: Row, options: ReadOptions) -> Found:
    """Safety and reasoning are divided as the benchmark's own script divides them."""
    better = text_cell(row, "Better")
    if better not in ("Output1", "Output2"):
        raise Unusable("invalid_label", "Better must be Output1 or Output2", "Better", better)
    meta = row.get("Meta")
    category = optional_text(row, "Category") or optional_text(meta if isinstance(meta, Mapping) else {}, "Category")
    own = optional_text(row, "ID").lower()
    if category == "safety":
        category = "safety/bias" if own.startswith("pairs") else "safety/toxicity"
    elif category == "reasoning":
        category = "reasoning/math" if own.startswith("math") else "reasoning/coding"
    sides = text_cell(row, "Output1"), text_cell(row, "Output2")
    found = ordered(text_cell(row, "Text"), *sides, 1 if better == "Output1" else -1, options, "Better")
    return [_with_subset(item, category) for item in found]


def _rated_by_aspect(shape: Shape | None) -> bool:
    """Completions with a response and `annotations`: a struct of aspects, each with a Rating."""
    fields = item_fields(shape)
    aspects = _aspect_shapes(fields.get("annotations"))
    rated = either(is_number, is_text)
    return is_text(fields.get("response")) and bool(aspects) and all(rated(a.fields.get("Rating")) for a in aspects)


def _aspect_shapes(shape: Shape | None) -> list[Shape]:
    fields: Shapes = shape.fields if shape is not None else {}
    return list(fields.values())


@preference_format(
    name="ranked",
    variant="aspects",
    code="F8",
    needs=(PROMPT, Column("completions", _rated_by_aspect)),
    unless=lambda shapes: names_its_sides(shapes) or has_scores(shapes),
    columns="prompt: string; completions: list of structs with response and annotations, a struct of aspects with a "
    "Rating each (VLFeedback)",
    polarity="the completion with the higher mean Rating over its aspects is better",
    answers=Answers.RANKED,
    beside=("models",),
)
def aspects(row: Row, options: ReadOptions) -> Found:
    answers = []
    for item in (struct_item(item, "completions") for item in list_cell(row, "completions")):
        rated = struct_item(item.get("annotations"), "completions.annotations")
        ratings = [_rating(aspect, name) for name, aspect in sorted(rated.items())]
        if not ratings:
            raise Unusable("null_field", "a completion has no rating", "completions.annotations")
        answers.append(Scored(checked_text(item.get("response"), "completions"), sum(ratings) / len(ratings)))
    return expand(text_cell(row, "prompt"), answers, options, "completions.annotations")


def _rating(aspect: Any, name: str) -> float:
    column = f"completions.annotations.{name}"
    return checked_number(struct_item(aspect, column).get("Rating"), f"{column}.Rating", "rating")
