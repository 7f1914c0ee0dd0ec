"""Exact mode gives the ids of RewardBench's own code, faults included, and refuses what has no meaning there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_score.config.schema import TextSpec
from dpo_score.data.types import EncodedPair, Pair, Rejected, Source, Text, TokenIds
from dpo_score.errors import ConfigError, ModelError
from dpo_score.tokenization.rewardbench import RewardBenchRenderer, text_of
from tests.rewardbench_oracle import twin_ids
from tests.tiny import byte_tokenizer

BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SPEAKER = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def merging_tokenizer(template: str, bos: str | None) -> PreTrainedTokenizerFast:
    """Bytes, with merges of every pair of a and b and of a line break before a: tokens grow across boundaries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ċ", "a"), ("a", "a"), ("b", "b")]
    vocabulary = [*alphabet, *("".join(pair) for pair in merges), "</s>", "<s>"]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def pair(prompt: Text, chosen: Text, rejected: Text) -> Pair:
    return Pair(Source("set", "file", 0, 0), prompt, chosen, rejected)


def encoded(tokenizer: object, item: Pair, limit: int | None = None) -> EncodedPair | Rejected:
    return RewardBenchRenderer(tokenizer, TextSpec(), limit).encode([item])[0]


def seen(found: EncodedPair | Rejected, side: str) -> tuple[list[int], list[int]]:
    """Ids of a side, and the places that are scored."""
    assert isinstance(found, EncodedPair)
    sequence = found.sequence(side)  # type: ignore[arg-type]
    return [*sequence.prompt.tolist(), *sequence.response.tolist()], sequence.scored_positions.tolist()


def assert_twins(tokenizer: object, prompt: str | list[str], chosen: str, rejected: str) -> None:
    given_ = prompt if isinstance(prompt, str) else tuple({"role": "x", "content": text} for text in prompt)
    answers = (chosen, rejected) if isinstance(prompt, str) else tuple(
        ({"role": "assistant", "content": text},) for text in (chosen, rejected)
    )  # fmt: skip
    ours, theirs = encoded(tokenizer, pair(given_, *answers)), twin_ids(tokenizer, prompt, chosen, rejected)
    assert seen(ours, "chosen") == (theirs.chosen, list(range(theirs.chosen_start, len(theirs.chosen))))
    assert seen(ours, "rejected") == (theirs.rejected, list(range(theirs.rejected_start, len(theirs.rejected))))


TOKENIZERS = {
    "chatml": byte_tokenizer(),
    "speaker": merging_tokenizer(SPEAKER, "<s>"),
    "bare": merging_tokenizer(BARE, "<s>"),
    "no bos": merging_tokenizer(BARE, None),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(st.text("ab \n", min_size=1, max_size=8), st.text("ab \n", max_size=8), st.text("ab \n", max_size=8))
def test_ids_are_those_of_the_twin(name: str, prompt: str, chosen: str, rejected: str) -> None:
    assert_twins(TOKENIZERS[name], prompt, chosen, rejected)


def test_turns_are_user_and_assistant_by_position() -> None:
    assert_twins(TOKENIZERS["speaker"], ["a question", "an answer", "another question"], "yes", "no")


@pytest.mark.parametrize("name", ["chatml", "bare"])
@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [(10, 2030, 5), (2100, 20, 5), (3000, 2000, 2500), (130, 1915, 1916), (128, 1918, 3), (10, 1999, 5)],
)
def test_long_rows_are_cut_as_there(prompt: int, chosen: int, rejected: int, name: str) -> None:
    text = "abcdefghij" * 300
    assert_twins(TOKENIZERS[name], text[:prompt], text[1:][:chosen], text[2:][:rejected])


def test_a_token_that_merges_on_one_side_moves_that_side_alone() -> None:
    found = encoded(TOKENIZERS["bare"], pair("xa", "b", "x"))
    assert isinstance(found, EncodedPair)
    assert "boundary_shift" in found.marks
    assert found.tokens.chosen_mask is None or found.tokens.chosen_mask.all()
    assert found.tokens.rejected_mask is not None
    assert found.tokens.rejected_mask.tolist() == [False, True, True]


def test_cut_sides_are_marked() -> None:
    found = encoded(TOKENIZERS["chatml"], pair("q", "a" * 2100, "b"))
    assert isinstance(found, EncodedPair)
    assert (found.tokens.chosen_truncated, found.tokens.rejected_truncated) == (True, False)


def test_bos_is_put_in_front_of_a_template_that_writes_its_own() -> None:
    doubled = merging_tokenizer("{{ bos_token }}" + BARE, "<s>")
    found = encoded(doubled, pair("q", "a", "b"))
    assert isinstance(found, EncodedPair)
    assert found.tokens.prompt[:2].tolist() == [doubled.bos_token_id] * 2
    assert "double_bos" in found.marks
    assert_twins(doubled, "q", "a", "b")


def test_a_prompt_repeated_in_the_answer_is_taken_out_of_it() -> None:
    tokenizer = TOKENIZERS["bare"]
    found = encoded(tokenizer, pair("xy", "1 xy 2", "3"))
    assert isinstance(found, EncodedPair)
    assert "".join(tokenizer.convert_ids_to_tokens(found.tokens.chosen.tolist())) == "1ĠĠ2</s>"


@pytest.mark.parametrize(
    ("item", "code"),
    [
        (pair(({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}), "x", "y"), "bad_role_order"),
        (pair("q", ({"role": "assistant", "content": "a"},) * 2, "y"), "bad_role_order"),
    ],
)
def test_what_has_no_meaning_there_is_rejected(item: Pair, code: str) -> None:
    found = encoded(TOKENIZERS["chatml"], item)
    assert isinstance(found, Rejected)
    assert found.code == code


def test_a_row_beyond_the_models_own_limit_is_rejected() -> None:
    found = encoded(TOKENIZERS["chatml"], pair("q" * 600, "a", "b"), limit=512)
    assert isinstance(found, Rejected)
    assert found.code == "too_long"


def test_what_no_row_could_mend_is_refused() -> None:
    ids = TokenIds(*(np.array([1, 2], np.int32) for _ in range(3)))
    with pytest.raises(ConfigError, match="holds token ids: say corrected"):
        encoded(TOKENIZERS["chatml"], Pair(Source("set", "file", 0, 0), "", "", "", ids))
    with pytest.raises(ModelError, match="needs a tokenizer with a chat template"):
        RewardBenchRenderer(byte_tokenizer(chat_template=None), TextSpec())


def test_settings_that_exact_fixes_are_refused_and_strings_become_chat() -> None:
    assert text_of("corrected", TextSpec(max_length=512)).render == "chat"
    assert text_of("corrected", TextSpec(render="raw")).render == "raw"
    assert text_of("exact", TextSpec(date="2024-01-01")).render == "chat"
    for wrong in ({"max_length": 512}, {"render": "raw"}, {"system": "be brief"}, {"score": "last"}):
        with pytest.raises(ConfigError, match=f"leave --{next(iter(wrong)).replace('_', '-')} out"):
            text_of("exact", TextSpec(**wrong))


def test_the_identity_says_exact() -> None:
    assert RewardBenchRenderer(TOKENIZERS["chatml"], TextSpec()).identity()["rewardbench"] == "exact"
