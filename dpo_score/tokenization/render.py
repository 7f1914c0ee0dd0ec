"""Pairs → token ids, exactly as TRL 1.16 makes them, a block at a time.

    strings        prompt, prompt + answer + EOS (unless it is there), with the tokenizer's own special tokens
    conversations  the chat template over prompt (ended for the answer) and over prompt + answer, nothing added

All texts of a block are rendered first, then tokenised in one call. Promises: one result for every pair, in order; the
same pair gives the same ids in any block; what the template did to the text is marked (`marks`). Does not promise that
TRL keeps the row: rows that TRL drops are rejected here with a code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from dpo_score.config.schema import TextSpec
from dpo_score.data.formats.row import rejected
from dpo_score.data.types import EncodedPair, Ids, Mask, Message, Pair, Problem, Rejected, Text, TokenIds
from dpo_score.errors import ConfigError, ModelError
from dpo_score.tokenization import flags as marks
from dpo_score.tokenization.chat_template import ChatTemplate, chat_template, refuses_system, system_refusal
from dpo_score.tokenization.loss_mask import response_masks
from dpo_score.tokenization.pictures import PictureProcessor, PictureTemplate
from dpo_score.tokenization.prompt import arranged, shared_length
from dpo_score.tokenization.tokenizer import BatchEncoder, TokenizerFailedError, special_texts, tokenizer_digest
from dpo_score.tokenization.truncation import boundary, cut, limit_of_rows, scored_count

VERSION = 1
_FAILED = Problem("tokenizer_error", "the tokenizer failed on a text of the row", None)
Part: TypeAlias = tuple[Literal["text", "chat", "labels"], str]
"""A text and how it becomes ids: with the tokenizer's special tokens, as a template wrote it, as a decoder's labels."""
PartIds: TypeAlias = Mapping[Part, Ids]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A pair as it will be scored, and the texts of P, PC and PR (see truncation.py)."""

    pair: Pair
    prompt: str
    with_chosen: str
    with_rejected: str

    @property
    def texts(self) -> tuple[str, str, str]:
        return self.prompt, self.with_chosen, self.with_rejected

    @property
    def parts(self) -> tuple[Part, ...]:
        """The texts, and how each becomes ids."""
        chat = self.pair.is_conversation
        return tuple(("chat" if chat else "text", text) for text in self.texts)


class AnswersApart(Rendered):
    """A pair whose prompt and answers become ids apart, as TRL's vision collator makes them."""

    @property
    def parts(self) -> tuple[Part, ...]:
        k = min(shared_length(self.prompt, whole) for whole in (self.with_chosen, self.with_rejected))
        return ("chat", self.prompt[:k]), ("chat", self.with_chosen[k:]), ("chat", self.with_rejected[k:])


class Renderer:
    """Turns pairs into ids under one tokenizer and one `TextSpec`.

    `tokenizer` may be None for sets that are token ids already. `context_limit`: the models' own length limit.
    Raises ConfigError and ModelError for what no row could mend; row problems are `Rejected` values.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: TextSpec,
        context_limit: int | None = None,
        processor: PictureProcessor | None = None,
    ) -> None:
        self.text, self.processor = text, processor
        self.limit = limit_of_rows(text.max_length, context_limit)
        self._tokenizer = tokenizer
        self._encoder = BatchEncoder(tokenizer) if tokenizer is not None else None
        self._template = self._chosen_template(tokenizer, text) if tokenizer is not None else None
        self._eos: str | None = getattr(tokenizer, "eos_token", None)
        self._bos_id: int | None = getattr(tokenizer, "bos_token_id", None)
        self._special = marks.special_pattern(special_texts(tokenizer)) if tokenizer is not None else None
        self._ends = marks.TurnEnds(tokenizer) if tokenizer is not None else None

    def _chosen_template(self, tokenizer: Any, text: TextSpec) -> ChatTemplate | None:
        """The template of a conversation; with a processor, one that makes room for pictures."""
        if self.processor is None:
            return chat_template(tokenizer, text)
        own = self.processor.processor.chat_template
        if text.chat_template is None and isinstance(own, str):  # some keep it with the processor alone
            text = text.model_copy(update={"chat_template": own})
        found = chat_template(tokenizer, text)
        if found is None:
            return None
        return PictureTemplate(**{f.name: getattr(found, f.name) for f in fields(found)}, processor=self.processor)

    @property
    def bounds(self) -> Mapping[str, int | None]:
        """What is bounded in a row, and by how many tokens."""
        return {"prompt and answer": self.limit}

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def identity(self) -> dict[str, Any]:
        """What decides the ids besides the data: JSON values. `date` is the one to give again on resume."""
        spec = self.text.model_dump(mode="json", exclude={"tokenizer", "chat_template", "max_length", "date"})
        return {
            **spec,
            "max_length": self.limit,
            "date": self._template.date if self._template else None,
            "template_sha256": self._template.sha256 if self._template else None,
            "tokenizer_sha256": self._tokenizer_sha256,
            "version": VERSION,
            **({"processor_sha256": self.processor.digest} if self.processor else {}),
        }

    @cached_property
    def _tokenizer_sha256(self) -> str | None:
        """A third of a second for a vocabulary of 50,000."""
        return tokenizer_digest(self._tokenizer) if self._tokenizer is not None else None

    def encode(self, pairs: Sequence[Pair]) -> list[EncodedPair | Rejected]:
        """One result for each pair, in order."""
        rendered = [self._rendered(pair) for pair in pairs]
        ids = self._ids([item for item in rendered if isinstance(item, Rendered)])
        results: list[EncodedPair | Rejected] = []
        for pair, item in zip(pairs, rendered, strict=True):
            lost = isinstance(item, Rendered) and not all(part in ids for part in item.parts)
            found = _FAILED if lost else item if isinstance(item, Problem) else self._encoded(pair, item, ids)
            if isinstance(found, Problem):
                results.append(rejected(pair.source, found))
            else:
                results.append(found)
        return results

    # --- pair → texts -------------------------------------------------------------------------------------------

    def _rendered(self, pair: Pair) -> Rendered | TokenIds | Problem:
        if pair.tokens is not None:
            return pair.tokens
        self._refuse_no_tokenizer(pair)
        found = arranged(pair, self.text)
        if isinstance(found, Problem):
            return found
        return self._chat(found) if found.is_conversation else self._raw(found)

    def _refuse_no_tokenizer(self, pair: Pair) -> None:
        if self._tokenizer is None:
            raise ModelError(f"row {pair.source.row_id} of {pair.source.file} is text, but no tokenizer is given")

    def _raw(self, pair: Pair) -> Rendered:
        prompt, chosen, rejected_ = (_string(part) for part in (pair.prompt, pair.chosen, pair.rejected))
        return Rendered(pair, prompt, prompt + self._ended(chosen), prompt + self._ended(rejected_))

    def _ended(self, answer: str) -> str:
        return answer if self._eos is None or answer.endswith(self._eos) else answer + self._eos

    def _chat(self, pair: Pair) -> Rendered | Problem:
        prompt, chosen, rejected_ = (_messages(part) for part in (pair.prompt, pair.chosen, pair.rejected))
        texts = []
        for messages, to_answer in ((prompt, True), (prompt + chosen, False), (prompt + rejected_, False)):
            text = self._applied(pair, messages, to_answer)
            if isinstance(text, Problem):
                return text
            texts.append(text + pair.answer_start if to_answer else text)
        apart = pair.pictures is not None and self.text.prompt_split == "trl"
        if apart and self.text.score != "completion":
            raise ConfigError(
                f"--prompt-split trl makes ids of answers about pictures apart from their prompts, which --score "
                f"{self.text.score} cannot follow: leave one of them out"
            )
        return AnswersApart(pair, *texts) if apart else Rendered(pair, *texts)

    def _applied(self, pair: Pair, messages: tuple[Message, ...], to_answer: bool) -> str | Problem:
        if self._template is None:
            raise ModelError(
                f"row {pair.source.row_id} of {pair.source.file} is a conversation, but the tokenizer has no chat "
                "template: give one with --chat-template FILE, or another tokenizer with --tokenizer"
            )
        how = (pair.tools, pair.chat_template_kwargs)
        found = self._template.render(messages, *how, to_answer)
        if isinstance(found, Problem) and refuses_system(self._template, found, messages, *how):
            raise system_refusal(pair.source, found.reason)
        return found

    # --- texts → ids --------------------------------------------------------------------------------------------

    def _ids(self, rendered: Sequence[Rendered]) -> PartIds:
        """The ids of every different text of a block; those that the tokenizer fails on are missing."""
        parts = list(dict.fromkeys(part for item in rendered for part in item.parts))
        found: dict[Part, Ids] = {}
        for how in dict.fromkeys(how for how, _ in parts):
            same = [part for part in parts if part[0] == how]
            try:
                found.update(zip(same, self._tokenised(how, [text for _, text in same]), strict=True))
            except TokenizerFailedError:  # one by one, so that only the rows with the text that fails are lost
                for part in same:
                    with suppress(TokenizerFailedError):
                        [found[part]] = self._tokenised(how, [part[1]])
        return found

    def _tokenised(self, how: str, texts: Sequence[str]) -> list[Ids]:
        assert self._encoder is not None
        if how == "labels":
            return self._encoder.target_ids(texts)
        return self._encoder.ids(texts, add_special_tokens=how == "text")

    def _encoded(self, pair: Pair, item: Rendered | TokenIds, ids: PartIds) -> EncodedPair | Problem:
        if isinstance(item, TokenIds):
            return self._cut(pair, item, [])
        prompt, with_chosen, with_rejected = (ids[part] for part in item.parts)
        if isinstance(item, AnswersApart):
            tokens = TokenIds(prompt, with_chosen, with_rejected)
            return self._cut(item.pair, tokens, self._marks(item, False, *(tokens.chosen, tokens.rejected)))
        k = boundary(prompt, with_chosen, with_rejected)
        masks = self._masks(item, k)
        tokens = TokenIds(with_chosen[:k], with_chosen[k:], with_rejected[k:], *masks)
        return self._cut(item.pair, tokens, self._marks(item, k < len(prompt), with_chosen, with_rejected, begin=k))

    def _masks(self, item: Rendered, k: int) -> tuple[Mask | None, Mask | None, Mask | None]:
        """Without masks every token of a response is scored: that is TRL's rule, and right for single answers."""
        score, pair = self.text.score, item.pair
        one_answer = isinstance(pair.chosen, str) or len(pair.chosen) == len(pair.rejected) == 1
        if score == "completion" or isinstance(pair.chosen, str) or (score == "last" and one_answer):
            return None, None, None
        assert self._template is not None
        assert self._encoder is not None
        return response_masks(self._template, self._encoder, pair, item.texts[1:], k, score)

    def _marks(self, item: Rendered, shifted: bool, chosen: Ids, rejected_: Ids, *, begin: int = 0) -> list[str]:
        """`begin`: where in `chosen` and `rejected_` the answers' own tokens begin."""
        assert self._ends is not None
        pair = item.pair
        asked = item.prompt.removesuffix(pair.answer_start)
        seen = {
            "boundary_shift": shifted,
            "special_in_text": marks.has_special(pair, self._special, self._eos),
            "content_altered": pair.is_conversation and marks.is_altered(pair, asked, *item.texts[1:]),
            "no_eos": not all(self._ends.close(ids[begin:]) for ids in (chosen, rejected_)),
            "double_bos": marks.doubles_bos(chosen, self._bos_id),
            "empty_answer": marks.is_empty(pair.chosen, pair.answer_start)
            or marks.is_empty(pair.rejected, pair.answer_start),
            "prompt_in_answer": marks.repeats_prompt(pair),
            "empty_prompt": marks.has_empty_turn(pair.prompt),
            "tools_unseen": bool(pair.tools) and not self._shows_tools(pair, asked),
        }
        return [*pair.marks, *(mark for mark, found in seen.items() if found)]

    def _shows_tools(self, pair: Pair, prompt_text: str) -> bool:
        """Whether the text of the prompt depends on the tools of the row."""
        if self._template is None or not pair.is_conversation:
            return False
        return self._template.without_tools(_messages(pair.prompt), pair.chat_template_kwargs) != prompt_text

    def _cut(self, pair: Pair, tokens: TokenIds, found: list[str]) -> EncodedPair | Problem:
        """Nothing to score is said of the whole answer first, then of what the cut left of it."""
        problem = unscorable(tokens) or self._misplaced(pair, tokens)
        kept = problem or self._within(tokens)
        if isinstance(kept, Problem):
            return kept
        if pair.pictures and not np.array_equal(kept.prompt, tokens.prompt):
            reason = f"cut to {self.limit} tokens at its beginning, the prompt would lose what stands before a picture"
            return Problem("image_cut", reason, "prompt", len(tokens.prompt))
        return unscorable(kept) or self._with_media(encoded_pair(pair, kept, found))

    def _misplaced(self, pair: Pair, tokens: TokenIds) -> Problem | None:
        """Tokens that stand for pictures belong into the prompt, where the pictures are."""
        if self.processor is None or pair.pictures is None:
            return None
        count = self.processor.count
        if count(tokens.chosen) or count(tokens.rejected) or (count(tokens.prompt) and not pair.pictures):
            reason = f"the text spells the token that stands for a picture ({self.processor.place})"
            return Problem("image_count", reason, "prompt")
        return None

    def _with_media(self, encoded: EncodedPair) -> EncodedPair:
        pictures = encoded.pair.pictures
        if not pictures or self.processor is None:
            return encoded
        return replace(encoded, media=self.processor.media(pictures))

    def _within(self, tokens: TokenIds) -> TokenIds | Problem:
        """The tokens within the limit, or why they are not to be cut."""
        return cut(tokens, self.limit, self.text.truncation)


def encoded_pair(pair: Pair, tokens: TokenIds, found: list[str]) -> EncodedPair:
    """The result for a pair: its tokens after truncation, and its marks."""
    identical = marks.is_identical(tokens.chosen, tokens.rejected)
    return EncodedPair(pair, tokens, (*found, "identical_pair") if identical else tuple(found))


def unscorable(tokens: TokenIds) -> Problem | None:
    """Why a pair cannot be scored: one side has no token to score."""
    for side, ids, mask in (
        ("chosen", tokens.chosen, tokens.chosen_mask),
        ("rejected", tokens.rejected, tokens.rejected_mask),
    ):
        if len(ids) == 0 or scored_count(tokens.prompt, tokens.prompt_mask, ids, mask) == 0:
            return Problem("no_completion_tokens", f"{side} has no token to score", side)
    return None


def _string(text: Text) -> str:
    assert isinstance(text, str)
    return text


def _messages(text: Text) -> tuple[Message, ...]:
    assert not isinstance(text, str)
    return text
