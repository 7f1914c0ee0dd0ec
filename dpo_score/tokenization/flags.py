"""What happened to a pair's text on its way to token ids: the marks of a scored row.

Marks are findings, not rejections: a trainer that reads the same row trains on the same tokens.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_score.data.types import SYSTEM_ROLES, EncodedPair, Ids, Message, Pair, Text, text_of
from dpo_score.escape import seen
from dpo_score.tokenization.prompt import shared_length
from dpo_score.tokenization.tokenizer import special_ids

END_WINDOW = 4
"""An end-of-turn token may be followed by a line break or two."""
EXAMPLE = 80
"""Characters of a text that a warning shows."""
LEAD, LONG = 32, 16
"""Characters of a speaker's name before a repeated question, and of a question that is not repeated by chance."""
HEADER = 80
"""Characters of what a chat template writes there."""
_HEADER = re.compile(r"(?:<[^<>]*>|\[/?\w+\]|[\W_]|\b(?:user|human|question|instruction|prompt|q)\b)*+", re.IGNORECASE)
ASKING = (*SYSTEM_ROLES, "user")
_USUAL_KEYS = {"role", "content"}
_REASONING = ("reasoning_content", "thinking", "reasoning")


def example(encoded: EncodedPair) -> str:
    """A pair as a warning may show it: the last words of its prompt and of the better answer, or their ids."""
    pair, last = encoded.pair, (last_words(encoded.pair.prompt), last_words(encoded.pair.chosen))
    shown = last if pair.tokens is None else (encoded.tokens.prompt.tolist(), encoded.tokens.chosen.tolist())
    return " → ".join(_shortened(part) for part in shown)


def _shortened(value: str | list[int]) -> str:
    text = value if isinstance(value, str) else " ".join(map(str, value[:EXAMPLE]))
    return f"'{seen(text, EXAMPLE)}{'…' if len(text) > EXAMPLE else ''}'"


def last_words(side: Text) -> str:
    if isinstance(side, str):
        return side
    return text_of(side[-1].get("content")) if side else ""


def special_pattern(texts: Collection[str]) -> re.Pattern[str] | None:
    """Matches any of `texts`, longest first."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def has_special(pair: Pair, pattern: re.Pattern[str] | None, eos: str | None) -> bool:
    """Whether the row's own text spells a special token; an answer's closing EOS is its convention, not a find."""
    if pattern is None:
        return False
    sides = (_without_end(side, eos) for side in (pair.chosen, pair.rejected))
    return any(pattern.search(text) for side in (pair.prompt, *sides) for text in texts_of(side))


def _without_end(side: Text, eos: str | None) -> Text:
    return side.removesuffix(eos) if isinstance(side, str) and eos else side


def texts_of(side: Text) -> Iterator[str]:
    """The strings of a side that a template should show: content, reasoning, names of called functions."""
    if isinstance(side, str):
        yield side
        return
    for message in side:
        if message.keys() == _USUAL_KEYS:
            if isinstance(message["content"], str):
                yield message["content"]
        else:
            yield from _message_texts(message)


def _message_texts(message: Message) -> Iterator[str]:
    reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
    content = message.get("content")
    parts = [part.get("text") for part in content] if isinstance(content, tuple) else [content]
    for text in (*parts, reasoning):
        if isinstance(text, str):
            yield text
    if isinstance(message.get("function_calls"), str):
        yield message["function_calls"]
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, Sequence) else ():
        yield from _function_name(call)


def _function_name(call: Any) -> Iterable[str]:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    name = function.get("name") if isinstance(function, Mapping) else None
    return [name] if isinstance(name, str) else []


def is_altered(pair: Pair, prompt_text: str, chosen_text: str, rejected_text: str) -> bool:
    """Whether a text of the row does not occur in its rendering, trimmed.

    The answer is looked for behind the prompt, where it belongs, so that a short one is not found by chance.
    """
    sides = ((pair.chosen, chosen_text), (pair.rejected, rejected_text))
    return any(text.strip() not in chosen_text for text in texts_of(pair.prompt)) or any(
        _is_missing(text.strip(), full, shared_length(prompt_text, full))
        for side, full in sides
        for text in texts_of(side)
    )


def _is_missing(text: str, full: str, begin: int) -> bool:
    """Whether `text` is not to be found from `begin` on.

    The search starts its own length earlier: a template may open a thought for the answer that the answer opens too.
    """
    return full.find(text, max(begin - len(text), 0)) < 0


def is_empty(side: Text, start: str = "") -> bool:
    """An answer of white space behind its given `start`, with no tool call to make up for it."""
    if isinstance(side, str):
        return not side.strip()
    return (
        not any(message.get("tool_calls") or message.get("function_calls") for message in side)
        and not last_words(side).removeprefix(start).strip()
    )


def repeats_prompt(pair: Pair) -> bool:
    """Whether answers begin with what was asked, or with a turn that is not the assistant's.

    Both answers have to begin with the last question; one alone counts where the question is at least LONG characters
    long, which no answer repeats by chance. White space and what names the speaker before it (a few words that
    do not end in one, or what a chat template writes) make no difference.
    """
    sides = (pair.chosen, pair.rejected)
    if any(not isinstance(side, str) and side and side[0].get("role") in ASKING for side in sides):
        return True
    question = " ".join(last_words(pair.prompt).split())
    found = [bool(question) and _begins_with(side, question) for side in sides]
    return all(found) or (any(found) and len(question) >= LONG)


def _begins_with(side: Text, question: str) -> bool:
    first = side if isinstance(side, str) else text_of(side[0].get("content")) if side else ""
    begun = " ".join(first[: 2 * (len(question) + HEADER)].split())[: len(question) + HEADER]
    at = begun.find(question)
    lead = begun[:at].rstrip() if at > 0 else ""
    return at >= 0 and (not lead or (at <= LEAD and not lead[-1].isalnum()) or _HEADER.fullmatch(lead) is not None)


def has_empty_turn(prompt: Text) -> bool:
    """Whether a prompt is empty, or has a message that says nothing and calls nothing; a system text may be empty."""
    if isinstance(prompt, str):
        return not prompt.strip()
    turns = (turn for turn in prompt if turn.get("role") not in SYSTEM_ROLES)
    return not all(text_of(turn.get("content")).strip() or turn.get("tool_calls") for turn in turns)


class TurnEnds:
    """How a tokenizer's texts close a turn. Remembers which tokens it found to be white space."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._special = tokenizer, special_ids(tokenizer)
        self._blank: dict[int, bool] = {}

    def close(self, answer: Ids) -> bool:
        """Whether an answer's own tokens end with a special one, white space behind it aside: a special token with
        words behind it opened the turn."""
        for token in map(int, answer[::-1][:END_WINDOW]):
            if token in self._special:
                return True
            if not self._is_blank(token):
                return False
        return False

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]


def doubles_bos(ids: Ids, bos: int | None) -> bool:
    return bos is not None and len(ids) > 1 and int(ids[0]) == int(ids[1]) == bos


def is_identical(a: Ids, b: Ids) -> bool:
    return bool(np.array_equal(a, b))
