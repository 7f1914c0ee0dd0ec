"""Rows for encoder-decoders: prompt and answer are texts of their own, and so are their limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dpo_score.config.schema import TextSpec
from dpo_score.data.types import EncodedPair, Pair, Source, TokenIds
from dpo_score.errors import ConfigError
from dpo_score.tokenization.encoder_decoder import EncoderDecoderRenderer
from dpo_score.tokenization.tokenizer import BatchEncoder
from dpo_score.tokenization.truncation import SideLimits
from tests.data.formats.golden_rows import bot, user
from tests.encoder_decoders import END, ending_tokenizer
from tests.tiny import CHATML, byte_tokenizer

SOURCE = Source("set", "rows.parquet", 0, 0)


def text(prompt: str = "abc", chosen: str = "de", rejected: str = "f") -> Pair:
    return Pair(SOURCE, prompt, chosen, rejected)


def encode(pair: Pair, own: SideLimits | None = None, tokenizer: Any = None, **spec: Any) -> Any:
    renderer = EncoderDecoderRenderer(tokenizer or ending_tokenizer(), TextSpec(**spec), own or SideLimits())
    return renderer.encode([pair])[0]


def ids(item: EncodedPair) -> list[list[int]]:
    return [part.tolist() for part in (item.tokens.prompt, item.tokens.chosen, item.tokens.rejected)]


def test_prompt_and_answers_are_each_what_the_tokenizer_makes_of_them() -> None:
    tokenizer = ending_tokenizer()
    found = encode(text("abc ", "xyz", "q"))
    assert ids(found) == [tokenizer("abc ").input_ids, *tokenizer(text_target=["xyz", "q"]).input_ids]
    assert found.marks == ()


def test_every_label_is_scored() -> None:
    assert encode(text()).sequence("chosen").scored_positions.tolist() == [4, 5, 6]


def test_a_tokenizer_that_ends_no_text_is_marked_and_gets_no_end() -> None:
    found = encode(text(), tokenizer=byte_tokenizer(None))
    assert ids(found) == [byte_tokenizer()(part).input_ids for part in ("abc", "de", "f")]
    assert found.marks == ("no_eos",)


def test_an_end_that_the_text_spells_out_is_one_too_many() -> None:
    found = encode(text("abc", "de<|endoftext|>"))
    assert found.tokens.chosen.tolist()[-2:] == [END, END]
    assert found.marks == ("special_in_text",)


def test_a_prompt_that_begins_twice_is_marked() -> None:
    found = encode(text("<|endoftext|>a"), tokenizer=byte_tokenizer(None, bos=True))
    assert "double_bos" in found.marks


def test_a_transcript_is_divided_first() -> None:
    hh = "\n\nHuman: q\n\nAssistant:"
    pair = Pair(SOURCE, "", f"{hh} yes", f"{hh} no", implicit=True)
    tokenizer = ending_tokenizer()
    assert ids(encode(pair)) == [tokenizer(part).input_ids for part in (hh, " yes", " no")]


def test_a_conversation_is_what_its_template_writes() -> None:
    pair = Pair(SOURCE, (user("q"),), (bot("yes"),), (bot("no"),))
    tokenizer = ending_tokenizer(CHATML)
    parts = [tokenizer.decode(part) for part in ids(encode(pair, tokenizer=tokenizer))]
    assert parts == ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>\n", "no<|im_end|>\n"]


def test_token_rows_pass_through_without_a_tokenizer() -> None:
    parts = [np.array(values, dtype=np.int32) for values in ([1, 2], [3, 4, 5], [6])]
    pair = Pair(SOURCE, "", "", "", tokens=TokenIds(*parts))
    found = EncoderDecoderRenderer(None, TextSpec(), SideLimits(answer=2)).encode([pair])[0]
    assert isinstance(found, EncodedPair)
    assert ids(found) == [[1, 2], [3, 4], [6]]


# --- limits --------------------------------------------------------------------------------------------------------


def lengths(item: EncodedPair) -> tuple[int, int, int]:
    return len(item.tokens.prompt), len(item.tokens.chosen), len(item.tokens.rejected)


@pytest.mark.parametrize(
    ("own", "asked", "found", "cut"),
    [
        (SideLimits(), None, (41, 31, 6), (False, False)),
        (SideLimits(41, 31), None, (41, 31, 6), (False, False)),
        (SideLimits(None, 20), None, (41, 20, 6), (True, False)),
        (SideLimits(40, 31), None, (40, 31, 6), (True, True)),
        (SideLimits(100, 20), 35, (35, 20, 6), (True, True)),
        (SideLimits(), 35, (35, 31, 6), (True, True)),
    ],
)
def test_each_side_has_its_own_limit(own: SideLimits, asked: int | None, found: Any, cut: Any) -> None:
    item = encode(text("a" * 40, "b" * 30, "c" * 5), own, max_length=asked)
    assert lengths(item) == found
    assert (item.tokens.chosen_truncated, item.tokens.rejected_truncated) == cut


def test_a_limit_beyond_the_models_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--max-length 65 .* 64 tokens of a prompt, 32"):
        encode(text(), SideLimits(64, 32), max_length=65)


@pytest.mark.parametrize(
    ("pair", "code"), [(text("a" * 9), "prompt_too_long"), (text("a", "b", "c" * 9), "too_long"), (text(), None)]
)
def test_reject_cuts_nothing(pair: Pair, code: str | None) -> None:
    assert getattr(encode(pair, max_length=8, truncation="reject"), "code", None) == code


def test_keep_end_keeps_the_last_tokens_of_each() -> None:
    found = encode(text("abcdef", "ghijkl", "m"), max_length=3, truncation="keep_end")
    assert [ending_tokenizer().decode(part) for part in ids(found)] == [
        "ef<|endoftext|>", "kl<|endoftext|>", "m<|endoftext|>",
    ]  # fmt: skip


# --- identity ------------------------------------------------------------------------------------------------------


def test_the_identity_follows_the_limits_and_what_ends_an_answer() -> None:
    plain, ending = byte_tokenizer(None), ending_tokenizer()
    choices = [(ending, SideLimits()), (ending, SideLimits(9, 8)), (ending, SideLimits(9, 9)), (plain, SideLimits())]
    found = [EncoderDecoderRenderer(tokenizer, TextSpec(), own).identity() for tokenizer, own in choices]
    assert [each["encoder_decoder"]["around"] for each in found] == [[END], [END], [END], []]
    assert len({repr(sorted(each["encoder_decoder"].items())) for each in found}) == len(choices)


class Translator(type(byte_tokenizer())):  # type: ignore[misc]
    """Labels begin with a token of their own, as a translation model's begin with their language."""

    def _switch_to_target_mode(self) -> None:
        self.backend_tokenizer.post_processor = byte_tokenizer(None, bos=True).backend_tokenizer.post_processor

    def _switch_to_input_mode(self) -> None:
        self.backend_tokenizer.post_processor = ending_tokenizer().backend_tokenizer.post_processor


def test_labels_get_the_special_tokens_of_labels() -> None:
    tokenizer = Translator(tokenizer_object=ending_tokenizer().backend_tokenizer, bos_token="<|endoftext|>")
    assert ids(encode(text("a", "b", "c"), tokenizer=tokenizer)) == [[64, END], [END, 65], [END, 66]]
    encoder = BatchEncoder(tokenizer)
    assert [part.tolist() for part in encoder.target_ids(["b"])] == [[END, 65]]
    assert [part.tolist() for part in encoder.ids(["b"], True)] == [[65, END]]
