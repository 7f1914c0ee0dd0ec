"""The one table of preference formats: how each is recognised, which side is better, what turns a row into pairs.

A format is one row of `TABLE` and one fixture in the tests. `bind` sees the schema alone. hh-transcript is
the exception: its schema is that of any two whole texts, so `detection.detect` looks at rows as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dpo_score.data.column_types import Shapes
from dpo_score.data.formats import chosen_rejected as sides
from dpo_score.data.formats import labelled as labels
from dpo_score.data.formats import ranked as lists
from dpo_score.data.formats import token_ids as ids
from dpo_score.data.formats.base import Reading
from dpo_score.data.formats.chosen_rejected import Binding
from dpo_score.data.formats.validate import Row
from dpo_score.data.types import Pair, Problem


@dataclass(frozen=True, slots=True)
class Format:
    """`polarity` is one sentence a person can check; `columns` is how the needed schema is put into words."""

    name: str
    code: str
    variant: str
    columns: str
    polarity: str
    bind: Callable[[Shapes], Binding | None]
    read: Callable[[Row, Reading], Iterable[Pair | Problem]]
    version: int = 1
    rows_per_unit: int = 1
    """Rows of the file that make one unit: 2 where consecutive rows are the two answers to one prompt."""

    @property
    def full_name(self) -> str:
        return f"{self.name}/{self.variant}" if self.variant else self.name


_CHOSEN = "chosen is better than rejected"

TABLE: tuple[Format, ...] = (
    Format(
        "ids",
        "F0",
        "",
        "prompt_ids, chosen_ids, rejected_ids: lists of integers (also *_input_ids)",
        "chosen_ids are better than rejected_ids",
        ids.bind_ids,
        ids.read_ids,
    ),
    Format(
        "ids",
        "F0",
        "labels",
        "chosen_input_ids, chosen_labels, rejected_input_ids, rejected_labels (-100 = not scored)",
        "chosen_input_ids are better than rejected_input_ids",
        ids.bind_labelled_ids,
        ids.read_labelled_ids,
    ),
    Format(
        "pair-text",
        "F1",
        "",
        "prompt (or question, instruction, input), chosen, rejected (or *_response): strings; system optional",
        _CHOSEN,
        sides.bind_pair_text,
        sides.read_pair_text,
    ),
    Format(
        "pair-text-implicit",
        "F1",
        "",
        "chosen, rejected: strings that both begin with the prompt",
        _CHOSEN,
        sides.bind_pair_text_implicit,
        sides.read_pair_text_implicit,
    ),
    Format(
        "hh-transcript",
        "F2",
        "",
        "chosen, rejected: transcripts with \\n\\nHuman: and \\n\\nAssistant: turns",
        _CHOSEN,
        sides.bind_pair_text_implicit,
        sides.read_hh_transcript,
    ),
    Format(
        "messages-full",
        "F3",
        "",
        "chosen, rejected: message lists that both begin with the prompt (a prompt string beside them is not read)",
        _CHOSEN,
        sides.bind_messages_full,
        sides.read_messages_full,
    ),
    Format(
        "messages-explicit",
        "F4",
        "",
        "prompt: message list; chosen, rejected: the answer's messages, message or string",
        _CHOSEN,
        sides.bind_messages_explicit,
        sides.read_messages_explicit,
    ),
    Format(
        "openai",
        "F4b",
        "",
        "input: struct with messages and tools; preferred_output, non_preferred_output: messages",
        "preferred_output is better than non_preferred_output",
        sides.bind_openai,
        sides.read_openai,
    ),
    Format(
        "signed-preference",
        "F5",
        "helpsteer2",
        "prompt, response_1, response_2: strings; preference_strength: -3 … 3",
        "a negative preference_strength means response_1 is better, a positive one response_2; 0 is a tie",
        labels.bind_helpsteer2_preference,
        labels.read_helpsteer2_preference,
    ),
    Format(
        "signed-preference",
        "F5",
        "helpsteer3",
        "context: message list; response1, response2: strings; overall_preference: -3 … 3",
        "a negative overall_preference means response1 is better, a positive one response2; 0 is a tie",
        labels.bind_helpsteer3,
        labels.read_helpsteer3,
    ),
    Format(
        "better-id",
        "F6",
        "",
        "prompt, response_0, response_1: strings; better_response_id and/or safer_response_id: 0 or 1",
        "the response that better_response_id (or, as --preference says, safer_response_id) numbers is better",
        labels.bind_better_id,
        labels.read_better_id,
    ),
    Format(
        "ab-label",
        "F7",
        "shp",
        "history, human_ref_A, human_ref_B: strings; labels: 0 or 1",
        "labels 1 means human_ref_A is better, 0 means human_ref_B is",
        labels.bind_shp,
        labels.read_shp,
    ),
    Format(
        "ab-label",
        "F7",
        "webgpt",
        "question: string or struct with full_text; answer_0, answer_1: strings; score_0, score_1: numbers",
        "the answer with the higher score is better, equal scores are a tie; quotes are not part of the prompt",
        labels.bind_webgpt,
        labels.read_webgpt,
    ),
    Format(
        "ab-label",
        "F7",
        "one-hot",
        "prompt, response_a, response_b: strings or JSON lists of them; winner_model_a, winner_model_b, winner_tie",
        "the winner column that is 1 names the better response",
        labels.bind_arena_one_hot,
        labels.read_arena_one_hot,
    ),
    Format(
        "ab-label",
        "F7",
        "winner",
        "conversation_a, conversation_b: message lists; winner: model_a, model_b or tie",
        "winner names the better conversation",
        labels.bind_arena_winner,
        labels.read_arena_winner,
    ),
    Format(
        "ab-label",
        "F7",
        "text",
        "prompt, response_a, response_b: strings; winner: model_a, model_b or tie",
        "winner names the better response",
        labels.bind_ab_text,
        labels.read_ab_text,
    ),
    Format(
        "ranked",
        "F8",
        "answers",
        "prompt: string; answers: list of structs with answer and rank",
        "the answer with the lower rank is better: rank 1 is the best",
        lists.bind_nectar,
        lists.read_nectar,
    ),
    Format(
        "ranked",
        "F8",
        "completions",
        "instruction or prompt: string; completions: list of structs with response and overall_score",
        "the completion with the higher overall_score (else fine-grained_score, score, rating) is better",
        lists.bind_completions,
        lists.read_completions,
    ),
    Format(
        "ranked",
        "F8",
        "lists",
        "prompt: string; responses (completions, generations, answers): strings; scores (ratings, rewards): numbers",
        "the answer with the higher score is better",
        lists.bind_lists,
        lists.read_lists,
    ),
    Format(
        "ranked",
        "F8",
        "two-rows",
        "prompt, response: strings; helpfulness: number; two consecutive rows for each prompt",
        "of two consecutive rows the one with the higher helpfulness is better; equal ones are a tie",
        lists.bind_two_rows,
        lists.read_two_rows,
        rows_per_unit=2,
    ),
    Format(
        "best-of-n",
        "F9",
        "",
        "prompt: string; chosen, rejected: lists of strings",
        "every answer in chosen is better than every answer in rejected",
        sides.bind_best_of_n,
        lists.read_best_of_n,
    ),
    Format(
        "sharegpt",
        "F10",
        "",
        "conversations: list of from and value (without the answer); chosen, rejected: structs of from and value",
        _CHOSEN,
        sides.bind_sharegpt,
        sides.read_sharegpt,
    ),
    Format(
        "summary",
        "F11",
        "",
        "info: struct with post or article; summaries: list of two structs with text; choice: 0 or 1",
        "choice numbers the better of the two summaries",
        labels.bind_summary,
        labels.read_summary,
    ),
)

CONVERSATIONS = ("F3", "F4", "F4b", "F5", "F10")
"""Format codes whose rows hold messages, or are read as such."""
TURNS = ("ab-label/one-hot", "ab-label/winner", "ranked/two-rows")
"""Formats that do, where not all of their code do."""
IDS = "F0"
"""The format whose rows hold token ids."""
LISTS = ("F8", "F9")
"""Format codes whose rows hold several answers: their pairs carry a group_id."""
BEST_OF_N = "F9"
"""The format whose rows hold right and wrong answers: their pairs carry the number of right ones."""


def describe_formats() -> list[dict[str, Any]]:
    """The table as plain values, for `dpo-score formats`."""
    keys = ("name", "code", "variant", "columns", "polarity", "version")
    return [{key: getattr(row, key) for key in keys} for row in TABLE]


def named(name: str) -> tuple[Format, ...]:
    """The rows a `--format` value means: a name, a code, or name/variant."""
    return tuple(row for row in TABLE if name in (row.name, row.code, row.full_name))
