"""Which tokens are the assistant's, where more than the last answer counts (`score: last` and `all-assistant`).

A turn begins where the rendering of the messages before it, ended with the assistant's opening, ends; it ends where the
rendering that includes it ends. That holds for templates whose rendering of a beginning is the beginning of the
rendering; for others a turn has no place, and they are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dpo_score.data.types import Mask, Message, Pair, Problem
from dpo_score.errors import ConfigError
from dpo_score.tokenization.chat_template import ChatTemplate
from dpo_score.tokenization.tokenizer import BatchEncoder, Encoded

Span = tuple[int, int]


def turn_spans(
    template: ChatTemplate, pair: Pair, messages: Sequence[Message], whole: str, score: Literal["last", "all-assistant"]
) -> list[Span]:
    """Characters of each scored assistant turn in `whole`, the rendering of `messages`. Raises ConfigError."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [_span(template, pair, messages, whole, i) for i in (turns[-1:] if score == "last" else turns)]


def _span(template: ChatTemplate, pair: Pair, messages: Sequence[Message], whole: str, i: int) -> Span:
    before = _beginning(template, pair, messages[:i], whole, to_answer=True) if i else ""
    until = whole if i + 1 == len(messages) else _beginning(template, pair, messages[: i + 1], whole, to_answer=False)
    return len(before), len(until)


def _beginning(template: ChatTemplate, pair: Pair, messages: Sequence[Message], whole: str, to_answer: bool) -> str:
    text: Any = template.render(messages, pair.tools, pair.chat_template_kwargs, to_answer)
    if isinstance(text, Problem) or not whole.startswith(text):
        raise ConfigError(
            f"the chat template renders the first {len(messages)} messages of row {pair.source.row_id} of "
            f"{pair.source.file} differently when more follow, so its turns cannot be separated: "
            "score completions only (--score completion), or give a template that leaves earlier turns as they are"
        )
    return str(text)


def mask_of(encoded: Encoded, spans: Sequence[Span]) -> Mask:
    """The tokens that hold a character of a span; one that reaches over its start counts, as at TRL's boundary."""
    mask = np.zeros(len(encoded.ids), dtype=bool)
    for start, end in spans:
        mask |= (encoded.ends > start) & (encoded.starts < end)
    return mask


def response_masks(
    template: ChatTemplate, encoder: BatchEncoder, pair: Pair, texts: Sequence[str], k: int, score: Any
) -> tuple[Mask | None, Mask | None, Mask | None]:
    """Masks over prompt, chosen and rejected; None means the usual (none of a prompt, all of a response)."""
    masks = []
    for side, whole in zip((pair.chosen, pair.rejected), texts, strict=True):
        messages = [*_turns(pair.prompt), *_turns(side)]
        spans = turn_spans(template, pair, messages, whole, score)
        mask = mask_of(encoder.with_offsets(whole, add_special_tokens=False), spans)
        if len(_turns(side)) == 1:
            mask[k:] = True
        masks.append(mask)
    prompt = masks[0][:k]
    answers = [mask[k:] for mask in masks]
    return (prompt if prompt.any() else None), *(None if mask.all() else mask for mask in answers)  # type: ignore[return-value]


def _turns(text: Any) -> Sequence[Message]:
    assert not isinstance(text, str)
    turns: Sequence[Message] = text
    return turns
