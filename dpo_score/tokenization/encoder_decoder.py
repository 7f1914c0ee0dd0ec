"""Pairs → token ids for encoder-decoders (T5, BART): the encoder reads the prompt, the answer is the decoder's labels.

    strings        tokenizer(prompt) and tokenizer(text_target=answer): each ends as the tokenizer ends a text, nothing
                   is added
    conversations  as for other models: what the template writes before the answer, and what from there on

Promises: limit and truncation hold for the prompt and for each answer by itself, as the model holds them. Every label
is scored; that is the scorer's part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_score.config.schema import TextSpec
from dpo_score.data.types import EncodedPair, Pair, Problem, TokenIds
from dpo_score.tokenization import flags as marks
from dpo_score.tokenization.render import Part, PartIds, Rendered, Renderer
from dpo_score.tokenization.truncation import SideLimits, cut_apart, limits_of_sides


@dataclass(frozen=True, slots=True)
class Apart(Rendered):
    """A pair of strings: the prompt and the two answers are texts of their own."""

    @property
    def parts(self) -> tuple[Part, ...]:
        return ("text", self.prompt), ("labels", self.with_chosen), ("labels", self.with_rejected)


class EncoderDecoderRenderer(Renderer):
    """`Renderer` for models that read prompt and answer apart. `own`: how much of each their positions allow."""

    def __init__(self, tokenizer: Any, text: TextSpec, own: SideLimits) -> None:
        super().__init__(tokenizer, text)
        self._eos = None  # the tokenizer ends each text: an end that the text spells out is one too many
        self.limits = limits_of_sides(text.max_length, own)
        known = [limit for limit in (self.limits.prompt, self.limits.answer) if limit is not None]
        self.limit = max(known, default=None)

    @property
    def bounds(self) -> Mapping[str, int | None]:
        return {"prompt": self.limits.prompt, "answer": self.limits.answer}

    def identity(self) -> dict[str, Any]:
        """`around`: the special tokens of an answer, which a tokenizer may add to labels alone."""
        around = self._encoder.target_ids([""])[0].tolist() if self._encoder is not None else None
        return {**super().identity(), "encoder_decoder": {**self.bounds, "around": around}}

    def _raw(self, pair: Pair) -> Rendered:
        return Apart(pair, *map(str, (pair.prompt, pair.chosen, pair.rejected)))

    def _encoded(self, pair: Pair, item: Rendered | TokenIds, ids: PartIds) -> EncodedPair | Problem:
        if not isinstance(item, Apart):
            return super()._encoded(pair, item, ids)
        prompt, chosen, rejected = (ids[part] for part in item.parts)
        found = self._marks(item, False, chosen, rejected)
        if marks.doubles_bos(prompt, self._bos_id) and "double_bos" not in found:
            found.append("double_bos")
        return self._cut(item.pair, TokenIds(prompt, chosen, rejected), found)

    def _within(self, tokens: TokenIds) -> TokenIds | Problem:
        return cut_apart(tokens, self.limits, self.text.truncation)
