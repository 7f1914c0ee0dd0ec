"""Pairs → token ids as RewardBench's DPO evaluation makes them (its `run_dpo.py`, read at commit 05a9005).

    P, PC, PR   the chat template over the user's turn and over user + assistant, without a generation prompt
    answer      PC with every occurrence of P taken out; so the assistant's header is scored, too
    ids         no special tokens; split at len(ids(P)), one earlier if ids(P) is no prefix of ids(P + answer);
                then BOS (or EOS where there is none) in front and EOS behind, whatever the template wrote
    length      prompt + longer answer over 2048: the prompt keeps its last 128, then each answer its first 1920

Promises the same ids as there, faults included: this is for comparing with published numbers. `corrected` numbers
come from render.py. Turns are user and assistant by position, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from dpo_score.config.schema import TextSpec
from dpo_score.data.formats.base import assistant_answer, user_prompt
from dpo_score.data.types import EncodedPair, Ids, Mask, Message, Pair, Problem, Text, TokenIds
from dpo_score.errors import ConfigError, ModelError
from dpo_score.tokenization.pictures import PictureProcessor
from dpo_score.tokenization.prompt import begun, divided
from dpo_score.tokenization.render import PartIds, Rendered, Renderer, encoded_pair, unscorable
from dpo_score.tokenization.truncation import shared_ids

MAX_LENGTH, MAX_PROMPT = 2048, 128
Mode = Literal["exact", "corrected"]
_FIXED = ("max_length", "render", "prompt_split", "score", "system", "system_mode", "truncation")


def text_of(mode: Mode, text: TextSpec) -> TextSpec:
    """The text settings of a RewardBench run: strings are turns of a chat. ConfigError where exact allows no choice."""
    defaults = TextSpec()
    changed = [name for name in _FIXED if getattr(text, name) not in (getattr(defaults, name), "chat")]
    if mode == "exact" and changed:
        flag = "--" + changed[0].replace("_", "-")
        raise ConfigError(f"--rewardbench exact fixes how text becomes tokens: leave {flag} out, or say corrected")
    return text.model_copy(update={"render": "chat"}) if text.render == "auto" else text


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One side: what the model sees first, and what is scored after it."""

    prompt: Ids
    answer: Ids

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


Sides: TypeAlias = tuple[Side, Side]


class RewardBenchRenderer(Renderer):
    """`Renderer` with RewardBench's rules; `limit` is theirs. A row beyond the model's own limit is rejected."""

    def __init__(self, tokenizer: Any, text: TextSpec, context_limit: int | None = None) -> None:
        super().__init__(tokenizer, text)
        self.limit = MAX_LENGTH
        self._context_limit = context_limit
        self._eos_id: int | None = getattr(tokenizer, "eos_token_id", None)
        if tokenizer is None or self._template is None or self._eos_id is None:
            raise ModelError(
                "--rewardbench exact needs a tokenizer with a chat template and an EOS token: name one with "
                "--tokenizer, or the template with --chat-template"
            )
        self._first_id = self._eos_id if self._bos_id is None else self._bos_id

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "rewardbench": "exact", "max_prompt": MAX_PROMPT}

    def _rendered(self, pair: Pair) -> Rendered | TokenIds | Problem:
        """Texts of P and of P + answer, the answer without any P in it."""
        found = _as_turns(pair)
        if isinstance(found, Problem):
            return found
        texts = []
        for side in ((), found.chosen, found.rejected):
            text = self._applied(found, (*_messages(found.prompt), *_messages(side)), to_answer=False)
            if isinstance(text, Problem):
                return text
            texts.append(text)
        prompt, with_chosen, with_rejected = texts
        return Rendered(found, prompt, *(prompt + text.replace(prompt, "") for text in (with_chosen, with_rejected)))

    def _encoded(self, pair: Pair, item: Rendered | TokenIds, ids: PartIds) -> EncodedPair | Problem:
        assert isinstance(item, Rendered)
        prompt, with_chosen, with_rejected = (ids[part] for part in item.parts)
        if min(len(with_chosen), len(with_rejected)) < len(prompt):
            return Problem("template_error", "the prompt alone has more tokens than prompt and answer", "prompt")
        sides = self._side(prompt, with_chosen), self._side(prompt, with_rejected)
        shifted = any(len(side.prompt) <= len(prompt) for side in sides)
        found = self._marks(item, shifted, *(np.concatenate([s.prompt, s.answer]) for s in sides))
        kept = joined(sides, cut_sides(*sides))
        return self._too_long(kept) or unscorable(kept) or encoded_pair(item.pair, kept, found)

    def _side(self, prompt: Ids, whole: Ids) -> Side:
        """BOS + everything before the split, everything after it + EOS."""
        at = len(prompt)
        if shared_ids(prompt, whole) < at:
            at -= 1
        first, last = (np.array([i], np.int32) for i in (self._first_id, self._eos_id))
        return Side(np.concatenate([first, whole[:at]]), np.concatenate([whole[at:], last]))

    def _too_long(self, tokens: TokenIds) -> Problem | None:
        longest = len(tokens.prompt) + max(len(tokens.chosen), len(tokens.rejected))
        if self._context_limit is None or longest <= self._context_limit:
            return None
        return Problem("too_long", f"{longest} tokens, the model's limit is {self._context_limit}", None, longest)


def cut_sides(chosen: Side, rejected: Side) -> Sides:
    """Both sides within MAX_LENGTH by the longer answer, as the module says."""
    longer = max(len(chosen.answer), len(rejected.answer))
    return _cut(chosen, longer), _cut(rejected, longer)


def _cut(side: Side, longer: int) -> Side:
    if len(side.prompt) + longer > MAX_LENGTH:
        side = replace(side, prompt=side.prompt[-MAX_PROMPT:])
    if len(side.prompt) + longer > MAX_LENGTH:
        side = replace(side, answer=side.answer[: MAX_LENGTH - MAX_PROMPT])
    return side


def joined(before: Sides, sides: Sides) -> TokenIds:
    """The two sides with their common prompt apart; what one side's prompt has more goes, unscored, before its answer.

    Prompts differ where a merged token moved the split of one side only. `before`: the sides before they were cut.
    """
    chosen, rejected = sides
    k = shared_ids(chosen.prompt, rejected.prompt)
    answers = [np.concatenate([side.prompt[k:], side.answer]) for side in sides]
    masks: list[Mask | None] = [None, None]
    if k < max(len(chosen.prompt), len(rejected.prompt)):
        masks = [np.arange(len(a)) >= len(side.prompt) - k for a, side in zip(answers, sides, strict=True)]
    shorter = [len(whole) > len(side) for whole, side in zip(before, sides, strict=True)]
    return TokenIds(chosen.prompt[:k], answers[0], answers[1], None, masks[0], masks[1], shorter[0], shorter[1])


def make_renderer(
    mode: Mode | None,
    tokenizer: Any,
    text: TextSpec,
    context_limit: int | None,
    processor: PictureProcessor | None = None,
) -> Renderer:
    """The renderer of a run: RewardBench's own for exact, else ours."""
    if mode == "exact" and processor is not None:
        raise ConfigError("--rewardbench exact is of texts, and the data have pictures: say corrected")
    if mode == "exact":
        return RewardBenchRenderer(tokenizer, text, context_limit)
    return Renderer(tokenizer, text, context_limit, processor)


# --- rows → turns -------------------------------------------------------------------------------------------------


def _as_turns(pair: Pair) -> Pair | Problem:
    """The pair as user and assistant turns by position, ending with one answer."""
    if pair.tokens is not None:
        raise ConfigError(f"--rewardbench exact renders text, but {pair.source.file} holds token ids: say corrected")
    found = divided(pair, "auto")
    if isinstance(found, Problem):
        return found
    if isinstance(found.prompt, str):
        found = begun(found)
    prompt = user_prompt(found.prompt) if isinstance(found.prompt, str) else _by_position(found.prompt)
    if len(prompt) % 2 == 0:
        return Problem("bad_role_order", f"the prompt has {len(prompt)} turns: the last is not the user's", "prompt")
    chosen, rejected = _one_answer(found.chosen, "chosen"), _one_answer(found.rejected, "rejected")
    if isinstance(chosen, Problem):
        return chosen
    if isinstance(rejected, Problem):
        return rejected
    return replace(found, prompt=prompt, chosen=chosen, rejected=rejected, tools=None, chat_template_kwargs={})


def _by_position(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(
        {"role": "assistant" if index % 2 else "user", "content": str(message.get("content") or "")}
        for index, message in enumerate(messages)
    )


def _one_answer(side: Text, column: str) -> tuple[Message, ...] | Problem:
    if isinstance(side, str):
        return assistant_answer(side)
    if len(side) != 1 or not isinstance(side[0], Mapping):
        return Problem("bad_role_order", f"{column} holds {len(side)} messages: RewardBench scores one", column)
    return assistant_answer(str(side[0].get("content") or ""))


def _messages(side: Text) -> tuple[Message, ...]:
    assert not isinstance(side, str)
    return side
