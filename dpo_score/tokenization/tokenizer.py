"""Tokenizers: loaded, compared, and used a whole block at a time.

`BatchEncoder` gives exactly the ids of `tokenizer(text)`, many texts a call. transformers is imported only inside the
functions that need it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from huggingface_hub import errors
from numpy.typing import NDArray

from dpo_score.data.types import Ids
from dpo_score.errors import DamageError, ModelError
from dpo_score.storage.base import parse_json

_PROBES = ("", "a", " The quick  brown\n\nfox 1234567.\t", "naïve — 東京 🙂", "<s>[INST] x </s>")
BATCH_CHARACTERS = 1 << 20
T = TypeVar("T")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model")
"""Any of these files in a folder means that it holds a tokenizer."""
_NO_PROGRAM_STATE = ("truncation", "padding")


def load_tokenizer(name_or_folder: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub id. Raises ModelError if there is none, or it is not a fast one."""
    from transformers import AutoTokenizer

    if not trust_remote_code:
        files = ("tokenizer_config.json",)
        refuse_remote_code(name_or_folder, files, "AutoTokenizer", "tokenizer", "name another with --tokenizer.")
    load = partial(AutoTokenizer.from_pretrained, revision=revision, trust_remote_code=trust_remote_code, use_fast=True)
    try:
        tokenizer = _guarded(lambda: _tried(load(name_or_folder)))
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).split("\n", 1)[0][:300]
        raise ModelError(
            f"no tokenizer can be loaded from {name_or_folder}: {reason} Name another with --tokenizer."
        ) from None
    except RecursionError:
        raise ModelError(
            f"{name_or_folder}: its tokenizer.json is nested too deep to be read, as no tokenizer's is. "
            "Name another with --tokenizer."
        ) from None
    except (
        TypeError,
        ArithmeticError,
        LookupError,
        AttributeError,
        errors.StrictDataclassError,
        TokenizerFailedError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{name_or_folder}: its config.json or tokenizer holds a wrong value: {reason}") from None
    return checked(tokenizer, name_or_folder)


def _tried(tokenizer: Any) -> Any:
    """`tokenizer` itself after a first text: some settings, as model_max_length, are not looked at before."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        tokenizer("a", verbose=False)
        special_ids(tokenizer)
    return tokenizer


def checked(tokenizer: Any, name: str) -> Any:
    """`tokenizer` itself, if it is one that batches of text can be encoded with exactly."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"{name}: its tokenizer ({type(tokenizer).__name__}) is not a fast one (no tokenizer.json). "
            "Convert it with transformers, or name another with --tokenizer."
        )
    return tokenizer


def refuse_remote_code(folder: str, names: Iterable[str], loader: str, what: str, instead: str) -> None:
    """Code that a model folder brings along is never run unless asked, even where it would not be needed.

    names: the settings files of the `what` (tokenizer, processor). loader: the key of `auto_map` that names its code.
    instead: what else a person can do. Raises ModelError.
    """
    for name in names:
        if loader in (settings_file(Path(folder) / name).get("auto_map") or {}):
            raise ModelError(
                f"{folder}: its {what} is code of its own (auto_map in {name}). If you have read and trust it, say "
                f"--trust-remote-code; otherwise {instead}"
            )


def settings_file(path: Path) -> dict[str, Any]:
    """A JSON file of settings; empty where there is none, or no object in it. ModelError where it cannot be read."""
    try:
        found = parse_json(path.read_bytes(), str(path)) if path.is_file() else {}
    except DamageError as error:
        raise ModelError(str(error)) from None
    return found if isinstance(found, dict) else {}


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 (hex) of all that decides text → ids: vocabulary, merges, rules, special tokens.

    The chat template is not in it, nor is padding or truncation, which are settings of a call.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in _NO_PROGRAM_STATE:
        rules.pop(key, None)
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    flags = {key: getattr(tokenizer, key, None) for key in ("add_bos_token", "add_eos_token", "split_special_tokens")}
    text = json.dumps([rules, special, flags], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def same_ids(reference: Any, other: Any, used_ids: Iterable[int]) -> list[tuple[int, str | None, str | None]]:
    """The first three of `used_ids` that mean different tokens: (id, reference's token, other's). Empty = the same."""
    ids = sorted({int(i) for i in used_ids})
    mine, theirs = (_tokens(tokenizer, ids) for tokenizer in (reference, other))
    return [(i, a, b) for i, a, b in zip(ids, mine, theirs, strict=True) if a != b][:3]


def _tokens(tokenizer: Any, ids: Sequence[int]) -> list[str | None]:
    backend = tokenizer.backend_tokenizer
    return [backend.id_to_token(i) for i in ids]


def special_texts(tokenizer: Any) -> frozenset[str]:
    """The strings that become special tokens wherever they are in a text."""
    added = (str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return frozenset({*map(str, tokenizer.all_special_tokens), *added} - {""})


def special_ids(tokenizer: Any) -> frozenset[int]:
    added = (int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset({*map(int, tokenizer.all_special_ids), *added})


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """Runs of texts of about BATCH_CHARACTERS: the backend's own records of a token are many times its id."""
    portion: list[str] = []
    size = 0
    for text in texts:
        portion.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Ids of one text, and where each token begins and ends in it (characters; [0, n) int64)."""

    ids: Ids
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


class TokenizerFailedError(Exception):
    """A tokenizer failed on a text, as regular expressions do that backtrack without end."""


def _guarded(call: Callable[[], T]) -> T:
    """What `call` returns.

    The tokenizers library reports a failure as a bare `Exception`, or as a panic of its Rust code, which is no
    `Exception` at all.
    """
    try:
        return call()
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise TokenizerFailedError(" ".join(str(error).split())[:120]) from None
        raise


COMPARED_TEXTS = 300
_NOTHING_AROUND = np.zeros(0, np.int32), np.zeros(0, np.int32)
_OWN_PIECES = frozenset({"ByteLevel", "Split", "Digits", "Punctuation", "Sequence"})
_OWN_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Sequence"})


def text_pieces(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches the pieces of a text whose ids, one after the other, are those of the text. None for a tokenizer of which
    that does not follow from its rules.

    Special tokens are cut out of a text before anything else is done to it, and what stands between two of them is
    normalised and divided by itself: a piece may end with one. That is no longer true where a special token takes in
    spaces beside it, or where the beginning of a text is marked, as tokenizers made from SentencePiece do. GPT-2's
    pattern (`use_regex` of ByteLevel) has no part that goes on from another character into a space, so there a piece
    also ends before the line break behind a word or a punctuation mark.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    added, model, division = rules.get("added_tokens") or [], rules.get("model") or {}, rules.get("pre_tokenizer")
    special = [token["content"] for token in added if token.get("special")]
    divided, formed = _kinds(division), _kinds(rules.get("normalizer"))
    if not special or any(token.get(key) for token in added for key in ("lstrip", "rstrip", "single_word")):
        return None
    if any(token.get("normalized") for token in added) or model.get("type") != "BPE" or model.get("dropout"):
        return None
    if not divided or not divided <= _OWN_PIECES or not formed <= _OWN_FORMS or _has(division, "add_prefix_space"):
        return None
    ends = [re.escape(text) for text in sorted(special, key=len, reverse=True)]
    if divided <= {"ByteLevel", "Digits", "Sequence"} and _has(division, "use_regex") and not formed:
        ends.append(r"(?<=[!-~])(?=\n)")
    return re.compile(f"(?s:.+?(?:{'|'.join(ends)})|.+)")


def _parts(rule: Any) -> list[Any]:
    """A rule of the tokenizers library, and those that it is made of."""
    if rule is None:
        return []
    inner = [part for key in ("pretokenizers", "normalizers") for part in rule.get(key) or []]
    return [rule, *(part for one in inner for part in _parts(one))]


def _kinds(rule: Any) -> set[str]:
    return {part["type"] for part in _parts(rule)}


def _has(rule: Any, setting: str) -> bool:
    return any(part.get(setting) is True for part in _parts(rule))


class BatchEncoder:
    """Texts → ids, a block at a time, straight through the fast backend.

    The backend is compared with `tokenizer(text)` on probes once; a tokenizer that does more in Python is called
    as it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._direct = all(self._agrees(special) for special in (True, False))
        self._pieces = text_pieces(tokenizer) if self._direct else None
        self._around = self._added_tokens() if self._pieces is not None else None
        self._to_compare = COMPARED_TEXTS

    def ids(self, texts: Sequence[str], add_special_tokens: bool) -> list[Ids]:
        """The ids of each text, as `tokenizer(text, add_special_tokens=…)` gives them. Raises TokenizerFailedError."""
        if not texts:
            return []
        if self._pieces is not None and self._around is not None:
            return self._ids_by_pieces(texts, *(self._around if add_special_tokens else _NOTHING_AROUND))
        if self._direct:
            return self._backend_ids(texts, add_special_tokens)
        found = self._called(list(texts), add_special_tokens)
        return [np.asarray(ids, dtype=np.int32) for ids in found]

    def target_ids(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text as a decoder's labels, as `tokenizer(text_target=…)` gives them."""
        if self._one_side:
            return self.ids(texts, add_special_tokens=True)
        return [np.asarray(ids, dtype=np.int32) for ids in self._labels(texts)]

    @cached_property
    def _one_side(self) -> bool:
        """Whether labels get the special tokens that other texts get; translation models mark the language apart."""
        return self._labels(_PROBES) == self._called(list(_PROBES), True)

    def _labels(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(text_target=list(texts), verbose=False)["input_ids"] if texts else []
        return ids

    def with_offsets(self, text: str, add_special_tokens: bool) -> Encoded:
        """The ids of one text with their places: slower, for masks only."""
        found = self.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
        offsets = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return Encoded(np.asarray(found["input_ids"], dtype=np.int32), offsets[:, 0], offsets[:, 1])

    def _backend_ids(self, texts: Sequence[str], add_special_tokens: bool) -> list[Ids]:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        found: list[Ids] = []
        for part in _portions(texts):
            encodings = _guarded(partial(backend.encode_batch_fast, part, add_special_tokens=add_special_tokens))
            found += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return found

    def _ids_by_pieces(self, texts: Sequence[str], before: Ids, after: Ids) -> list[Ids]:
        """The ids of texts that share most of their lines, as a prompt and it with either answer do: every different
        piece is encoded once. The first texts are encoded whole, too, and held against it; where one differs, no text
        is divided any more."""
        assert self._pieces is not None
        pieces = [self._pieces.findall(text) for text in texts]
        different = list(dict.fromkeys(piece for parts in pieces for piece in parts))
        ids = dict(zip(different, self._backend_ids(different, add_special_tokens=False), strict=True))
        found = [np.concatenate([before, *(ids[piece] for piece in parts), after]) for parts in pieces]
        if self._to_compare > 0:
            special = len(before) + len(after) > 0
            whole = self._backend_ids(texts[: self._to_compare], add_special_tokens=special)
            self._to_compare -= len(whole)
            if not all(map(np.array_equal, whole, found)):
                self._pieces = None
                return self._backend_ids(texts, add_special_tokens=special)
        return found

    def _added_tokens(self) -> tuple[Ids, Ids] | None:
        """The special tokens that stand before and after every text; None where that is not all there is to it."""
        bare, whole = (self._backend_ids(_PROBES, special) for special in (False, True))
        begin = next((i for i, token in enumerate(whole[1]) if token == bare[1][0]), 0)
        before, after = whole[1][:begin], whole[1][begin + len(bare[1]) :]
        same = (np.array_equal(np.concatenate([before, a, after]), b) for a, b in zip(bare, whole, strict=True))
        return (before, after) if all(same) else None

    def _called(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        found = _guarded(partial(self.tokenizer, texts, add_special_tokens=add_special_tokens, verbose=False))
        ids: list[list[int]] = found["input_ids"]
        return ids

    def _agrees(self, add_special_tokens: bool) -> bool:
        try:
            slow = [self._called([text], add_special_tokens)[0] for text in _PROBES]
            fast = self._backend_ids(_PROBES, add_special_tokens)
        except TokenizerFailedError:  # some word of the probes is not in its vocabulary
            return False
        return all(list(a) == list(b) for a, b in zip(fast, slow, strict=True))
