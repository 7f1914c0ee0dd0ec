"""`--score last` and `--score all-assistant`: the assistant's turns, found in the rendering, as token masks."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_score.config.schema import TextSpec
from dpo_score.data.types import EncodedPair, Pair, Source
from dpo_score.errors import ConfigError
from dpo_score.tokenization.render import Renderer
from tests.data.formats.golden_rows import bot, user
from tests.tiny import CHATML, byte_tokenizer

HERE = Source("set", "rows.parquet", 0, 7)
LONG = Pair(HERE, (user("q"), bot("first"), user("r")), (bot("good"),), (bot("bad"),))
PARTED = Pair(
    HERE, (user("q"),), (bot("one"), user("go"), bot("two")), (bot("uno"), user("go"), bot("dos")),
)  # fmt: skip


def scored(pair: Pair, score: Any, side: Any = "chosen", tokenizer: Any = None, **text: Any) -> str:
    """The scored tokens as text."""
    tokenizer = tokenizer or byte_tokenizer()
    [found] = Renderer(tokenizer, TextSpec(score=score, **text)).encode([pair])
    assert isinstance(found, EncodedPair), found
    sequence = found.sequence(side)
    ids = [*sequence.prompt, *sequence.response]
    return str(tokenizer.decode([ids[i] for i in sequence.scored_positions]))


def test_completion_scores_all_that_follows_the_prompt() -> None:
    assert scored(LONG, "completion") == "good<|im_end|>\n"
    assert scored(PARTED, "completion", "rejected") == (
        "uno<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\ndos<|im_end|>\n"
    )


def test_last_scores_only_the_last_answer() -> None:
    assert scored(LONG, "last") == scored(LONG, "completion")
    assert scored(PARTED, "last") == "two<|im_end|>\n"
    assert scored(PARTED, "last", "rejected") == "dos<|im_end|>\n"


def test_all_assistant_scores_the_turns_of_the_context_too() -> None:
    assert scored(LONG, "all-assistant") == "first<|im_end|>\ngood<|im_end|>\n"
    assert scored(LONG, "all-assistant", "rejected") == "first<|im_end|>\nbad<|im_end|>\n"
    assert scored(PARTED, "all-assistant") == "one<|im_end|>\ntwo<|im_end|>\n"


def test_single_turns_are_the_same_under_every_rule() -> None:
    pair = Pair(HERE, (user("q"),), (bot("good"),), (bot("bad"),))
    renderers = [Renderer(byte_tokenizer(), TextSpec(score=score)) for score in ("completion", "last", "all-assistant")]
    found = [renderer.encode([pair])[0] for renderer in renderers]
    assert len({item.pair_digest for item in found}) == 1  # type: ignore[union-attr]
    assert all(item.sequence("chosen").scored is None for item in found)  # type: ignore[union-attr]


def test_the_masks_are_cut_with_the_tokens() -> None:
    whole = scored(LONG, "all-assistant")
    assert scored(LONG, "all-assistant", max_length=80) == whole[: len(scored(LONG, "all-assistant", max_length=80))]


def test_accents_and_emoji_do_not_move_the_mask() -> None:
    pair = Pair(HERE, (user("où? 🙂"), bot("là 🙂"), user("東京?")), (bot("oui 東"),), (bot("non"),))
    assert scored(pair, "all-assistant") == "là 🙂<|im_end|>\noui 東<|im_end|>\n"


def test_a_template_that_rewrites_its_history_is_refused() -> None:
    forgetful = CHATML.replace("(m['content'] or '')", "(m['content'] if loop.last else 'gone')")
    with pytest.raises(ConfigError, match=r"row 0:7 of rows.parquet differently when more follow"):
        scored(LONG, "all-assistant", tokenizer=byte_tokenizer(forgetful))


def test_plain_text_has_one_turn() -> None:
    pair = Pair(HERE, "q", "good", "bad")
    assert scored(pair, "all-assistant") == scored(pair, "completion") == "good<|im_end|>"
