"""What a preference format is: the columns it needs, which answer it takes as better, and how it reads a row.

A format is one function with the decorator `preference_format`, in the file of its family, and one fixture in
tests/data/formats/golden.py. A complete example:

>>> from dpo_score.data.column_types import Shape, is_number, is_text
>>> from dpo_score.data.formats.cells import Row, number_cell, text_cell
>>> @preference_format(
...     name="ab-label",
...     variant="thumbs",
...     needs=(
...         Column("question", is_text),
...         Column("left", is_text),
...         Column("right", is_text),
...         Column("thumbs_left", is_number),
...     ),
...     columns="question, left, right: strings; thumbs_left: 1, 0 or -1",
...     polarity="a positive thumbs_left means left is better, a negative one right; 0 is a tie",
... )
... def thumbs(row: Row, options: ReadOptions) -> Found:
...     question, left, right = (text_cell(row, name) for name in ("question", "left", "right"))
...     return ordered(question, left, right, number_cell(row, "thumbs_left"), options, "thumbs_left")
>>> text = Shape("text")
>>> thumbs.match({"question": text, "left": text, "right": text, "thumbs_left": Shape("int"), "note": text})
{'question': 'question', 'left': 'left', 'right': 'right', 'thumbs_left': 'thumbs_left'}
>>> [pair] = thumbs.read({"question": "2 + 2?", "left": "5", "right": "4", "thumbs_left": -1}, ReadOptions())
>>> pair.chosen, pair.rejected
('4', '5')
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias

from dpo_score.data.column_types import Shape, Shapes
from dpo_score.data.formats.cells import Row
from dpo_score.data.types import NOWHERE, Message, Pair, Problem, Text, Unusable

Found: TypeAlias = Iterable[Pair | Problem]
"""What a row gives: pairs, still without source and id, or why there is none."""
ColumnMap: TypeAlias = Mapping[str, str]
"""Name that a format's reader uses → the column of the file that holds it."""


class Content(Enum):
    """What the pairs of a format hold."""

    TEXT = "text"
    CONVERSATION = "conversation"
    TOKEN_IDS = "ids"  # noqa: S105 - no password


class Answers(Enum):
    """How many answers one row holds, which decides what its pairs carry."""

    PAIR = "one better, one worse"
    RANKED = "several with scores: the pairs of a row carry a group_id"
    RIGHT_AND_WRONG = "several right and wrong ones: the pairs of a row carry a group_id and num_correct"


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """The choices a person makes about a set, as the readers need them."""

    pairing: Literal["best-worst", "all", "adjacent", "random"] = "best-worst"
    preference: Literal["better", "safer"] | None = None
    keep_ties: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Column:
    """A column that a format reads.

    name: what the reader calls it, and the key of --map. fits: whether a column of this shape can be it.
    also: other names it has in public sets, best first. optional: the format fits without it, too. earlier_turns: it
    holds the turns before the prompt, so that a set of texts that has it is read as conversations.
    """

    name: str
    fits: Callable[[Shape | None], bool]
    also: tuple[str, ...] = ()
    optional: bool = False
    earlier_turns: bool = False

    def find(self, shapes: Shapes, fixed: Collection[str] = ()) -> str | None:
        """The name under which a set has this column. `fixed`: names that a person gave with --map."""
        names = (self.name,) if self.name in fixed else (self.name, *self.also)
        return next((name for name in names if self.fits(shapes.get(name))), None)


@dataclass(frozen=True, slots=True)
class Format:
    """One shape of preference data.

    code: the short name that `dpo-score formats` shows. columns: the needed schema in words. polarity: one sentence
    that a person can check against the set's card.
    unless: true for schemas that belong to another format although the columns fit.
    sample_fits: for formats that only the rows tell apart; sees rows with the reader's names. Among formats that
    fit one schema, those whose rows fit win over those that do not look.
    beside: columns that public sets have next to these and that are no part of the question; a set is not refused
    for leaving them unread.
    categories: the reader itself gives each pair a subset.
    answer_start: pairs tell how both answers begin, which is not scored.
    grouped_by: where several rows are the answers to one prompt: the name of the column that they share. The reader
    then gets them together, as `row["rows"]`.
    """

    name: str
    variant: str
    needs: tuple[Column, ...]
    columns: str
    polarity: str
    read: Callable[[Row, ReadOptions], Found]
    code: str = ""
    content: Content = Content.TEXT
    answers: Answers = Answers.PAIR
    unless: Callable[[Shapes], bool] | None = None
    sample_fits: Callable[[Sequence[Row]], bool] | None = None
    beside: tuple[str, ...] = ()
    categories: bool = False
    answer_start: bool = False
    grouped_by: str | None = None
    version: int = 1

    @property
    def full_name(self) -> str:
        return f"{self.name}/{self.variant}" if self.variant else self.name

    @property
    def holds_ids(self) -> bool:
        """Whether rows are token ids, which need no tokenizer and no template."""
        return self.content is Content.TOKEN_IDS

    def is_conversational(self, columns: ColumnMap) -> bool:
        """Whether rows are conversations, which a chat template renders: so are texts with a system text or history."""
        turns = any(column.earlier_turns and column.name in columns for column in self.needs)
        return self.content is Content.CONVERSATION or "system" in columns or "images" in columns or turns

    def match(self, shapes: Shapes, fixed: Collection[str] = ()) -> dict[str, str] | None:
        """The columns of a set that this format reads, or None if the set is no such format.

        shapes: column → shape. fixed: names that a person gave with --map, for which no other name is looked up.
        """
        if self.unless is not None and self.unless(shapes):
            return None
        found: dict[str, str] = {}
        for column in self.needs:
            name = column.find(shapes, fixed)
            if name is not None:
                found[column.name] = name
            elif not column.optional or column.name in fixed:
                return None
        return found


def preference_format(
    *, name: str, columns: str, polarity: str, needs: tuple[Column, ...], variant: str = "", **more: Any
) -> Callable[[Callable[[Row, ReadOptions], Found]], Format]:
    """Makes a `Format` of the function that reads its rows. registry.py finds it in the file of its family."""

    def make(read: Callable[[Row, ReadOptions], Found]) -> Format:
        return Format(name=name, variant=variant, needs=needs, columns=columns, polarity=polarity, read=read, **more)

    return make


def pair(prompt: Text, chosen: Text, rejected: Text, **more: Any) -> Pair:
    """One pair as a reader finds it: row.py adds the source, the id and what is carried along."""
    return Pair(NOWHERE, prompt, chosen, rejected, **more)


def ordered(prompt: Text, first: Text, second: Text, preference: float, options: ReadOptions, column: str) -> Found:
    """One pair from a signed preference: positive = `first` is better; zero is a tie."""
    if preference == 0:
        return [tie(prompt, first, second, options, column)]
    chosen, rejected = (first, second) if preference > 0 else (second, first)
    return [pair(prompt, chosen, rejected)]


def tie(prompt: Text, first: Text, second: Text, options: ReadOptions, column: str) -> Pair | Problem:
    """Two answers of which neither is better: scored in the given order with --keep-ties, else a problem."""
    if options.keep_ties:
        return pair(prompt, first, second, tied=True)
    return Problem("tie", f"{column} says neither answer is better (--keep-ties scores such rows as given)", column)


def user_prompt(text: str) -> tuple[Message, ...]:
    """A prompt string as a conversation."""
    return ({"role": "user", "content": text},)


def assistant_answer(text: str) -> tuple[Message, ...]:
    """An answer string as a conversation."""
    return ({"role": "assistant", "content": text},)


def whole_conversations(chosen: Sequence[Message], rejected: Sequence[Message]) -> Pair:
    """Two whole conversations: the prompt is what they share, which `tokenization.prompt` cuts off later."""
    return pair((), tuple(chosen), tuple(rejected), implicit=True)


SEEN_BY_TEMPLATES = (
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "function_calls",
    "functions",
    "tools",
    "reasoning_content",
    "reasoning",
    "thinking",
)
"""Keys of a message that chat templates read. Others (num_tokens, id, timestamps) are notes of whoever made the set."""


def as_seen(turns: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages reduced to what a template can read, to be compared: notes and null keys are left out."""
    return [{key: turn[key] for key in SEEN_BY_TEMPLATES if turn.get(key) is not None} for turn in turns]


def same_context(first: Sequence[Message], second: Sequence[Message], columns: str) -> tuple[Message, ...]:
    """The turns before the two last ones. Raises Unusable where a template would see different ones, or none."""
    before, other = tuple(first[:-1]), tuple(second[:-1])
    if before != other and as_seen(before) != as_seen(other):
        raise Unusable("context_mismatch", f"the two answers follow different conversations in {columns}", columns)
    if len(first) < 2:
        raise Unusable("bad_role_order", f"{columns} begin with the answer: there is no prompt", columns)
    return before
