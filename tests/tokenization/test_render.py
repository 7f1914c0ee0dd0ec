"""The renderer as a whole: one result a pair, the same in any block, and an identity that follows every choice."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpo_score.config.schema import TextSpec
from dpo_score.data.types import EncodedPair, Pair, Rejected, Source, TokenIds
from dpo_score.errors import ConfigError, ModelError
from dpo_score.tokenization import tokenizer as tokenizers
from dpo_score.tokenization.render import Renderer
from dpo_score.tokenization.tokenizer import BatchEncoder
from tests.data.formats.golden_rows import bot, user
from tests.tiny import CHATML, byte_tokenizer


def at(row: int) -> Source:
    return Source("set", "rows.parquet", 0, row)


def text(row: int, prompt: str = "q?", chosen: str = "yes", rejected: str = "no") -> Pair:
    return Pair(at(row), prompt, chosen, rejected)


def chat(row: int, *prompt: Any, chosen: str = "yes", rejected: str = "no") -> Pair:
    return Pair(at(row), prompt or (user("q?"),), (bot(chosen),), (bot(rejected),))


def encode(*pairs: Pair, tokenizer: Any = None, context_limit: int | None = None, **spec: Any) -> list[Any]:
    return Renderer(tokenizer or byte_tokenizer(), TextSpec(**spec), context_limit).encode(pairs)


def decoded(item: EncodedPair, tokenizer: Any = None) -> tuple[str, str, str]:
    parts = (item.tokens.prompt, item.tokens.chosen, item.tokens.rejected)
    a, b, c = ((tokenizer or byte_tokenizer()).decode(ids) for ids in parts)
    return a, b, c


def test_text_gets_its_end_and_nothing_else() -> None:
    [found] = encode(text(0, "q? ", "yes", "no<|im_end|>"))
    assert decoded(found) == ("q? ", "yes<|im_end|>", "no<|im_end|>")


def test_a_tokenizer_that_begins_texts_begins_each_once() -> None:
    [found] = encode(text(0), tokenizer=byte_tokenizer(None, bos=True))
    assert decoded(found) == ("<|endoftext|>q?", "yes<|endoftext|>", "no<|endoftext|>")


def test_a_conversation_is_rendered_by_its_template() -> None:
    [found] = encode(chat(0))
    assert decoded(found) == (
        "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n",
        "yes<|im_end|>\n",
        "no<|im_end|>\n",
    )


def test_how_answers_begin_is_read_and_not_scored() -> None:
    """Steps before the judged one: a prompt of text ends with them, with a chat template they begin the answer."""
    pair = Pair(at(0), "q?", "yes", "no", answer_start="Step 1. ")
    [raw], [chat_], [empty] = (
        encode(pair), encode(pair, render="chat"), encode(replace(pair, chosen=""), render="chat"),
    )  # fmt: skip
    assert decoded(raw) == ("q?\nStep 1. ", "yes<|im_end|>", "no<|im_end|>")
    turn = "<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n"
    assert decoded(chat_) == (f"{turn}Step 1. ", "yes<|im_end|>\n", "no<|im_end|>\n")
    assert (raw.marks, chat_.marks, empty.marks) == ((), (), ("empty_answer",))
    assert chat_.pair.chosen == (bot("Step 1. yes"),)


def test_one_result_a_pair_in_order_with_rejects_in_their_places() -> None:
    pairs = [text(0), chat(1, user("q"), bot("x")), chat(2), Pair(at(3), "", "same", "same", implicit=True), text(4)]
    found = encode(*pairs)
    assert [getattr(item, "code", "scored") for item in found] == ["scored", "bad_role_order", *["scored"] * 3]
    rows = [item.source.row if isinstance(item, Rejected) else item.pair.source.row for item in found]
    assert rows == [0, 1, 2, 3, 4]


def test_a_pair_has_the_same_ids_in_any_block() -> None:
    pairs = [text(i, f"q{i % 3}", f"a{i}", "b") for i in range(9)] + [chat(9 + i, user(f"q{i}")) for i in range(4)]
    together = encode(*pairs)
    alone = [encode(pair)[0] for pair in pairs]
    assert [item.pair_digest for item in together] == [item.pair_digest for item in alone]


def test_the_pair_that_comes_back_is_the_one_that_was_scored() -> None:
    """Its prompt is explicit, and scoring it again gives the same ids."""
    hh = Pair(at(0), "", "\n\nHuman: q\n\nAssistant: yes", "\n\nHuman: q\n\nAssistant: yeah", implicit=True)
    [first] = encode(hh)
    assert first.pair.prompt == "\n\nHuman: q\n\nAssistant:"
    assert not first.pair.implicit
    assert encode(first.pair)[0].pair_digest == first.pair_digest
    [wrapped] = encode(hh, render="chat", system="Be brief.")
    assert wrapped.pair.prompt == ({"role": "system", "content": "Be brief."}, user("q"))
    assert encode(wrapped.pair)[0].pair_digest == wrapped.pair_digest


def test_an_answer_without_tokens_is_rejected() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    [found] = encode(chat(0, chosen=""), tokenizer=byte_tokenizer(template))
    assert found.code == "no_completion_tokens"
    assert found.source.row == 0


def test_a_single_first_token_has_nothing_to_follow() -> None:
    [found] = encode(text(0, "", "<|im_end|>", "no"))
    assert found.code == "no_completion_tokens"


def test_the_limit_is_max_length_or_else_the_models_own() -> None:
    long = text(0, "q?", "y" * 50)
    [unlimited], [own], [asked] = (
        encode(long),
        encode(long, context_limit=20),
        encode(long, context_limit=20, max_length=10),
    )
    lengths = [len(item.tokens.prompt) + len(item.tokens.chosen) for item in (unlimited, own, asked)]
    assert lengths == [53, 20, 10]
    assert [item.tokens.chosen_truncated for item in (unlimited, own, asked)] == [False, True, True]
    assert not asked.tokens.rejected_truncated
    assert [i.code for i in encode(text(0, "q" * 30), text(1, "q", "y" * 30), max_length=20, truncation="reject")] == [
        "prompt_too_long", "too_long",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="more than the model's own limit of 20"):
        encode(long, context_limit=20, max_length=30)


def test_token_rows_pass_through_without_a_tokenizer() -> None:
    ids = [np.array(values, dtype=np.int32) for values in ([1, 2], [3, 4, 5], [6])]
    pair = Pair(at(0), "", "", "", tokens=TokenIds(*ids, chosen_mask=np.array([True, False, True])))
    [found] = Renderer(None, TextSpec(max_length=4)).encode([pair])
    assert isinstance(found, EncodedPair)
    assert [found.tokens.prompt.tolist(), found.tokens.chosen.tolist(), found.tokens.rejected.tolist()] == [
        [1, 2],
        [3, 4],
        [6],
    ]
    assert found.sequence("chosen").scored_positions.tolist() == [2]
    with pytest.raises(ModelError, match=r"row 0:1 of rows\.parquet is text, but no tokenizer is given"):
        Renderer(None, TextSpec()).encode([text(1)])


def test_a_conversation_needs_a_template() -> None:
    with pytest.raises(ModelError, match="--chat-template"):
        encode(chat(0), tokenizer=byte_tokenizer(None))


def test_a_template_that_fails_on_a_row_rejects_that_row() -> None:
    picky = CHATML + "{% if messages[0].content == 'bad' %}{{ raise_exception('not this') }}{% endif %}"
    found = encode(chat(0), chat(1, user("bad")), chat(2), tokenizer=byte_tokenizer(picky))
    assert [getattr(item, "code", "scored") for item in found] == ["scored", "template_error", "scored"]
    assert "not this" in found[1].reason


def test_a_template_without_a_system_role_stops_with_the_way_out() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    item = chat(3, {"role": "system", "content": "s"}, user("q?"))
    with pytest.raises(ConfigError, match=r"row 0:3 of rows.parquet.*--system-mode merge-user"):
        encode(item, tokenizer=byte_tokenizer(strict))
    [merged] = encode(item, tokenizer=byte_tokenizer(strict), system_mode="merge-user")
    assert decoded(merged)[0].startswith("<|im_start|>user\ns\n\nq?<|im_end|>")


def test_the_identity_follows_every_choice() -> None:
    def identity(tokenizer: Any = None, **spec: Any) -> str:
        return repr(sorted(Renderer(tokenizer or byte_tokenizer(), TextSpec(**spec)).identity().items()))

    choices: list[dict[str, Any]] = [
        {}, {"max_length": 9}, {"render": "chat"}, {"prompt_split": "trl"}, {"score": "last"}, {"truncation": "reject"},
        {"chat_template": "{{ messages }}"}, {"chat_template_kwargs": {"a": 1}}, {"system": "s"},
        {"system_mode": "drop"}, {"keep_nulls": True}, {"tokenizer": byte_tokenizer(bos=True)},
    ]  # fmt: skip
    assert len({identity(**choice) for choice in choices}) == len(choices)
    assert identity() == identity()


def test_a_date_in_the_identity_makes_the_same_ids_again() -> None:
    dated = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    first = Renderer(byte_tokenizer(dated), TextSpec())
    again = Renderer(byte_tokenizer(dated), TextSpec(date=first.identity()["date"]))
    other = Renderer(byte_tokenizer(dated), TextSpec(date="2001-01-01"))
    digests = [r.encode([chat(0)])[0].pair_digest for r in (first, again, other)]  # type: ignore[union-attr]
    assert digests[0] == digests[1] != digests[2]
    assert first.identity() == again.identity() != other.identity()


def test_this_room_needs_neither_torch_nor_transformers_to_import() -> None:
    code = (
        "import sys, dpo_score.data.dataset, dpo_score.tokenization.render, dpo_score.tokenization.tokenizer;"
        "print([m for m in ('torch', 'transformers', 'jinja2', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tokenizer_that_gives_up_on_a_text_loses_that_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizers library reports a regular expression without end as a panic, which is no `Exception`."""
    PanicException = type("PanicException", (BaseException,), {})
    renderer = Renderer(byte_tokenizer(), TextSpec())
    true_ids = BatchEncoder._backend_ids

    def ids(self: BatchEncoder, texts: Any, add_special_tokens: bool) -> Any:
        def call() -> Any:
            if any("no end" in text for text in texts):
                raise PanicException("backtracking")
            return true_ids(self, texts, add_special_tokens)

        return tokenizers._guarded(call)

    monkeypatch.setattr(BatchEncoder, "_backend_ids", ids)
    found = renderer.encode([text(0), text(1, chosen="no end"), text(2)])
    assert [getattr(item, "code", "scored") for item in found] == ["scored", "tokenizer_error", "scored"]
