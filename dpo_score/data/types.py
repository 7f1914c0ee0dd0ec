"""The records that flow from a data file to a scorer. No torch, no tokenizer.

    row ──formats──▶ Pair ──render──▶ EncodedPair ──sequences()──▶ TokenSequence (what is scored and cached)
      └────────────── Rejected (code, reason) ◀──────────┘

Every input row becomes pairs or a `Rejected`; nothing is dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int32]
Mask: TypeAlias = NDArray[np.bool_]
Message: TypeAlias = Mapping[str, Any]
"""A chat message as templates see it: role, content, and whatever else the row holds (tool_calls, name, …)."""
Text: TypeAlias = str | tuple[Message, ...]
SYSTEM_ROLES = ("system", "developer")
"""Roles whose messages instruct the assistant and are no turn of the conversation."""
Side: TypeAlias = Literal["chosen", "rejected"]


def text_of(content: Any) -> str:
    """What a message says: its content, or the texts of its parts."""
    if isinstance(content, tuple):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return str(content or "")


REJECT_CODES = frozenset(
    {
        "null_field",
        "no_completion_tokens",
        "not_assistant_last",
        "context_mismatch",
        "bad_role_order",
        "tie",
        "non_text_content",
        "prompt_too_long",
        "too_long",
        "too_large",
        "invalid_utf8",
        "invalid_json",
        "invalid_csv",
        "invalid_label",
        "invalid_ids",
        "wrong_type",
        "template_error",
        "tokenizer_error",
        "nonfinite_logp",
        "no_reference_value",
        "not_hh_transcript",
        "encoded_text",
        "unread_context",
        "image_missing",
        "image_broken",
        "image_too_large",
        "image_animated",
        "image_mode",
        "image_count",
        "image_cut",
    }
)
MARKS: Mapping[str, str] = {
    "boundary_shift": "prompt and answer share a token at their boundary, so the cut moved",
    "special_in_text": "the text spells out special tokens, which the tokenizer takes as such",
    "content_altered": "the chat template changed or dropped text of the messages",
    "no_eos": "the rendering ends without an end-of-turn token",
    "double_bos": "the prompt begins with two BOS tokens",
    "identical_pair": "both answers are the same",
    "empty_answer": "an answer is empty",
    "empty_prompt": "the prompt, or a message of it, is empty",
    "tools_unseen": "the row has tools, but its rendered text is the same without them",
    "prompt_unread": "the prompt column says what the conversation does not hold; the conversation is scored",
    "prompt_in_answer": "answers begin with the prompt, or with something like it, which is scored as part of them",
}
"""Findings on a scored pair, and what each means. Trainers train on such pairs, so they are marked, not rejected."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a pair comes from. `part` counts the pairs that one row was expanded to (None: exactly one)."""

    dataset: str
    file: str
    file_index: int
    row: int
    part: int | None = None

    @property
    def row_id(self) -> str:
        base = f"{self.file_index}:{self.row}"
        return base if self.part is None else f"{base}:{self.part}"


def row_place(row_id: str) -> tuple[int, ...]:
    """(file, row) or (file, row, part) of a row id; ids sort by it in the order in which rows were read.

    ValueError for a text that is no row id.
    """
    return tuple(int(number) for number in row_id.split(":"))


NOWHERE = Source("", "", 0, 0)
"""The source of a pair that has not been given one yet."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be scored: `code` from REJECT_CODES, `reason` one sentence, the value as it was seen."""

    source: Source
    code: str
    reason: str
    column: str | None = None
    value_seen: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row, or one of the pairs it expands to, cannot be scored."""

    code: str
    reason: str
    column: str | None = None
    value: Any = None


class Unusable(Exception):
    """Carries a `Problem` from a cell up to where the row is read, which turns it into a `Rejected`."""

    def __init__(self, code: str, reason: str, column: str | None = None, value: Any = None) -> None:
        super().__init__(reason)
        self.problem = Problem(code, reason, column, value)


@dataclass(frozen=True, slots=True)
class Picture:
    """Where the bytes of a picture are, and what they are; never the pixels.

    width, height: in pixels, as it is shown (turned as its EXIF data say). path: the picture's own file; with a `row`,
    the data file that holds it in this row of `column`, at `index` of a list.
    """

    sha256: str
    width: int
    height: int
    path: str
    row: int | None = None
    column: str = ""
    index: int = 0


@dataclass(frozen=True, slots=True)
class Media:
    """The pictures of a prompt in their order. `preparation`: digest of what turns them into a model's inputs."""

    pictures: tuple[Picture, ...]
    preparation: str

    @property
    def content(self) -> bytes:
        """What two prompts must share, beside their ids, to be the same: the preparation and every picture's bytes."""
        return "\n".join((self.preparation, *(picture.sha256 for picture in self.pictures))).encode()


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Prompt, chosen and rejected answer as token ids ([n] int32 each), as a row holds them or after truncation.

    Masks ([n] bool) tell which tokens are scored; None means every token of an answer, no token of a prompt.
    """

    prompt: Ids
    chosen: Ids
    rejected: Ids
    prompt_mask: Mask | None = None
    chosen_mask: Mask | None = None
    rejected_mask: Mask | None = None
    chosen_truncated: bool = False
    rejected_truncated: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference: `chosen` is better than `rejected` as an answer to `prompt`.

    Strings are raw text; tuples of messages are a conversation. A pair read from a file may be `implicit`;
    the pair inside an `EncodedPair` never is: it is the pair as it was scored. The reader of a format leaves `source`
    at NOWHERE and `pair_id` empty; `RowReader` fills them.
    `tied` marks a labelled tie kept by --keep-ties: scored in the given order and left out of accuracy.
    """

    source: Source
    prompt: Text
    chosen: Text
    rejected: Text
    tokens: TokenIds | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    implicit: bool = False
    """The row has no prompt of its own: `prompt` is empty, both sides are whole; `text.prompt_split` divides them."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Columns carried to the output: id, subset, group_id, and those of --keep-columns."""
    answer_start: str = ""
    """How both answers begin, which is not scored: the steps before the judged one. The sides of an arranged
    conversation hold it; of strings it ends the prompt there."""
    marks: tuple[str, ...] = ()
    """Names from MARKS that the reader of the format found; those of the rendering are beside the token ids."""
    pair_id: str = ""
    """blake2b-128 of the source messages, hexadecimal: stable across re-export, order and renaming of files."""
    pictures: tuple[Picture, ...] | None = None
    """Those that the image parts of the messages stand for, in order; None where the set has no column of pictures."""

    @property
    def is_conversation(self) -> bool:
        """Whether the answers are messages; otherwise they are strings (or token ids)."""
        return not isinstance(self.chosen, str)


def ids_digest(*parts: Ids) -> hashlib.blake2b:
    """A running blake2b-128 over id lists, each with its length before it, so that boundaries count."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in parts:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
    return digest


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """The unit of scoring and of the cache: one response after one prompt.

    `scored` is over prompt + response (bool); None is the usual case: every response token. The first token
    of the whole sequence has no predecessor and is never scored, whatever the mask says.
    """

    prompt: Ids
    response: Ids
    scored: Mask | None = None
    media: Media | None = None

    @property
    def key(self) -> bytes:
        """Content address: blake2b-128 of both id lists (length-prefixed, little-endian int32), the mask, and the
        content of the prompt's pictures."""
        digest = ids_digest(self.prompt, self.response)
        if self.scored is not None:
            digest.update(np.packbits(self.scored).tobytes())
        if self.media is not None:
            digest.update(b"pictures" + self.media.content)
        return digest.digest()

    @property
    def prompt_key(self) -> bytes:
        """Equal for sequences that can share a prompt: its ids, and the content of its pictures."""
        ids = self.prompt.astype(np.int32, copy=False).tobytes()
        return ids if self.media is None else ids + b"pictures" + self.media.content

    @property
    def scored_positions(self) -> NDArray[np.int64]:
        """Positions in prompt + response whose log-probability is asked for, ascending, never 0."""
        if self.scored is None:
            start = max(len(self.prompt), 1)
            return np.arange(start, len(self.prompt) + len(self.response))
        positions = np.flatnonzero(self.scored)
        return positions[positions > 0]

    @property
    def scored_count(self) -> int:
        """How many positions are scored."""
        if self.scored is None:
            return len(self.response) if len(self.prompt) else max(len(self.response) - 1, 0)
        return int(np.count_nonzero(self.scored[1:]))


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPair:
    """A pair and its token ids after truncation. `marks`: names from MARKS."""

    pair: Pair
    tokens: TokenIds
    marks: tuple[str, ...] = ()
    media: Media | None = None

    @property
    def pair_digest(self) -> str:
        """blake2b-128 (hex) of the three id lists after truncation: what a trainer recomputes to check a value."""
        return ids_digest(self.tokens.prompt, self.tokens.chosen, self.tokens.rejected).hexdigest()

    def sequence(self, side: Side) -> TokenSequence:
        """Prompt and one answer, as they are scored."""
        tokens = self.tokens
        response = tokens.chosen if side == "chosen" else tokens.rejected
        mask = tokens.chosen_mask if side == "chosen" else tokens.rejected_mask
        if mask is None and tokens.prompt_mask is None:
            return TokenSequence(tokens.prompt, response, media=self.media)
        prompt_mask = np.zeros(len(tokens.prompt), bool) if tokens.prompt_mask is None else tokens.prompt_mask
        response_mask = np.ones(len(response), bool) if mask is None else mask
        return TokenSequence(tokens.prompt, response, np.concatenate([prompt_mask, response_mask]), self.media)
