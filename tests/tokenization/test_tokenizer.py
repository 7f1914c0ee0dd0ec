"""Tokenizers are loaded safely, told apart by what their ids mean, and batched without changing an id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_score.errors import ModelError
from dpo_score.tokenization.pictures import PROCESSOR_FILES
from dpo_score.tokenization.tokenizer import (
    BatchEncoder,
    TokenizerFailedError,
    checked,
    load_tokenizer,
    refuse_remote_code,
    same_ids,
    special_ids,
    special_texts,
    text_pieces,
    tokenizer_digest,
)
from tests.tiny import byte_tokenizer

BYTES = byte_tokenizer(bos=True)


@given(st.lists(st.text(max_size=20), max_size=6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_batch_gives_the_ids_of_single_calls(texts: list[str], special: bool) -> None:
    encoder = BatchEncoder(BYTES)
    assert [ids.tolist() for ids in encoder.ids(texts, special)] == [
        BYTES(text, add_special_tokens=special)["input_ids"] for text in texts
    ]


def test_settings_left_on_the_tokenizer_do_not_reach_the_batch() -> None:
    tokenizer = byte_tokenizer()
    encoder = BatchEncoder(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert [len(ids) for ids in encoder.ids(["a", "bcd"], False)] == [1, 3]


def test_a_tokenizer_that_does_more_in_python_is_called_as_it_is() -> None:
    class Doubling:
        """Adds a token that its backend knows nothing of."""

        def __init__(self) -> None:
            self.core = byte_tokenizer()
            self.backend_tokenizer = self.core.backend_tokenizer

        def __call__(self, texts: list[str], **kwargs: Any) -> dict[str, Any]:
            return {"input_ids": [[1, *ids] for ids in self.core(texts, **kwargs)["input_ids"]]}

    assert BatchEncoder(Doubling()).ids(["a"], True)[0].tolist() == [1, *byte_tokenizer()("a")["input_ids"]]


def test_offsets_count_characters() -> None:
    found = BatchEncoder(byte_tokenizer()).with_offsets("é<|im_end|>x", False)
    assert list(zip(found.starts.tolist(), found.ends.tolist(), strict=True))[-2:] == [(1, 11), (11, 12)]


def test_the_digest_follows_the_rules_and_not_the_settings() -> None:
    base = tokenizer_digest(byte_tokenizer())
    used = byte_tokenizer("another template")
    used(["a", "b"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(used) == base
    grown, moved = byte_tokenizer(), byte_tokenizer()
    grown.add_tokens(["new"])
    moved.eos_token = "<|pad|>"
    assert (
        len({base, tokenizer_digest(grown), tokenizer_digest(moved), tokenizer_digest(byte_tokenizer(bos=True))}) == 4
    )


def test_tokenizers_are_compared_on_the_ids_that_occur() -> None:
    grown = byte_tokenizer()
    grown.add_tokens(["new"])
    assert same_ids(byte_tokenizer(), grown, [3, 1, 2, 259]) == []
    assert same_ids(byte_tokenizer(), grown, [260]) == [(260, None, "new")]


def test_the_first_three_differences_are_shown() -> None:
    from tests.tiny import SPECIALS

    other = byte_tokenizer()
    names = {**other.get_vocab()}
    assert [token for token, i in sorted(names.items(), key=lambda item: item[1])][-4:] == list(SPECIALS)
    swapped = _with_vocabulary({0: 1, 1: 0, 2: 3, 3: 2})
    assert [i for i, _, _ in same_ids(other, swapped, range(10))] == [0, 1, 2]


def _with_vocabulary(renumbered: dict[int, int]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    rules = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    rules["model"]["vocab"] = {t: renumbered.get(i, i) for t, i in rules["model"]["vocab"].items()}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)))


def test_special_tokens_are_known_as_text_and_id() -> None:
    assert {"<|im_end|>", "<|im_start|>"} <= special_texts(byte_tokenizer())
    assert special_ids(byte_tokenizer()) == {256, 257, 258, 259}


def test_a_folder_loads_with_its_template(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    found = load_tokenizer(str(tmp_path))
    assert tokenizer_digest(found) == tokenizer_digest(load_tokenizer(str(tmp_path)))
    assert found("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]
    assert found.chat_template


def test_a_folder_without_one_is_refused_in_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="--tokenizer") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_code_that_comes_along_is_not_run_unasked(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", ['{"a": ' + "[" * 20_000 + "]" * 20_000 + "}", "{cut", "\xff"])
def test_settings_that_are_no_settings_are_one_sentence(content: str, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: (not JSON|JSON nested 20,001 deep)"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("value", [[1024], {}, "1024"])
def test_a_setting_that_is_not_looked_at_before_a_first_text_is_tried_at_load(value: Any, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": value}))
    with pytest.raises(ModelError, match=f"{tmp_path}: its config.json or tokenizer holds a wrong value: '>' not"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_code_of_a_processor_is_refused_by_the_same_rule(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"auto_map": {"AutoProcessor": "evil.Evil"}}))
    rule = (str(tmp_path), PROCESSOR_FILES, "AutoProcessor", "processor", "leave the pictures out")
    with pytest.raises(ModelError, match=rf"its processor is code of its own \(auto_map in {name}\)"):
        refuse_remote_code(*rule)
    (tmp_path / name).write_text(json.dumps({"auto_map": {"AutoTokenizer": "evil.Evil"}}))
    refuse_remote_code(*rule)


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="not a fast one"):
        checked(object(), "folder")


WRONG = {
    "a wrong type": lambda fields: json.dumps({**fields, "padding": "x"}),
    "a pattern that is none": lambda fields: json.dumps(
        {
            **fields,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        }
    ),
    "too deep": lambda fields: '{"model": ' + "[" * 20_000 + "]" * 20_000 + "}",
    "no vocabulary": lambda fields: json.dumps({**fields, "model": {"type": "BPE"}}),
    "not an object": lambda fields: "[1]",
    "cut off": lambda fields: json.dumps(fields)[:-9],
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_holds_something_else_is_one_sentence(what: str, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(WRONG[what](json.loads(path.read_text())))
    with pytest.raises(ModelError, match=str(tmp_path)) as refused:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_tokenizer_that_knows_only_some_words_encodes_those() -> None:
    core = Tokenizer(models.WordLevel(vocab={"yes": 0, "no": 1}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = BatchEncoder(PreTrainedTokenizerFast(tokenizer_object=core))
    assert [ids.tolist() for ids in encoder.ids(["yes no", "no"], False)] == [[0, 1], [1]]
    with pytest.raises(TokenizerFailedError):
        encoder.ids(["perhaps"], False)


@pytest.mark.parametrize("special", [False, True])
def test_ids_piece_by_piece_are_those_of_the_whole_text(special: bool) -> None:
    encoder = BatchEncoder(byte_tokenizer(bos=special))
    divided = encoder._pieces
    assert divided is not None
    parts = ["<|im_start|>", "<|im_end|>", "\n", " ", "user", "naïve 東京 🙂", "<|im_", "end|>", "\r\n\r\n", "'s 1234"]
    random = np.random.default_rng(0)
    texts = ["", *("".join(random.choice(parts, random.integers(1, 12))) for _ in range(200))]
    assert all("".join(divided.findall(text)) == text for text in texts)
    encoder._to_compare = 0
    for found, whole in zip(encoder.ids(texts, special), encoder._backend_ids(texts, special), strict=True):
        assert found.tolist() == whole.tolist()


def test_pieces_that_do_not_add_up_are_noticed_among_the_first_texts() -> None:
    encoder = BatchEncoder(byte_tokenizer(bos=True))
    encoder._around = np.array([7], np.int32), np.zeros(0, np.int32)
    texts = ["a<|im_end|>b", "<|im_end|>"]
    expected = [encoder._called([text], True)[0] for text in texts]
    assert [ids.tolist() for ids in encoder.ids(texts, True)] == expected
    assert encoder._pieces is None


@pytest.mark.parametrize(
    "changed",
    [
        {"normalizer": {"type": "Prepend", "prepend": "_"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ],
    ids=["prepended", "metaspace", "not divided", "prefixed"],
)
def test_tokenizers_that_mark_beginnings_are_given_whole_texts(changed: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps({**rules, **changed}))
    assert text_pieces(byte_tokenizer()) is not None
    assert text_pieces(tokenizer) is None


def test_a_special_token_that_takes_in_spaces_is_no_end_of_a_piece() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|x|>", rstrip=True, special=True)]})
    assert text_pieces(tokenizer) is None
