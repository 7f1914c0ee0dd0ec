"""The texts of pairs, read again from the data that OUT was scored from, and their tokens.

Scores hold no text. Promises: a text is given only when the data files are still there and their digests are those
that were scored; tokens only when their ids give the stored pair_digest. Else the reason is given instead. Reads the
tokenizer when tokens are asked for, never a model's weights (a .gguf file is converted once, as for a run).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from dpo_score.config.load import load_config, with_secrets_again
from dpo_score.config.schema import RunConfig
from dpo_score.data.dataset import DataFile, Dataset, open_data, read_rows_at
from dpo_score.data.types import EncodedPair, Pair, Rejected, Text, row_place
from dpo_score.errors import DamageError, DpoScoreError, ModelError, UsageError
from dpo_score.models.limits import text_limits
from dpo_score.models.locate import locate, no_progress
from dpo_score.models.resolve import ModelSource, Resolver, resolve_policy
from dpo_score.storage.base import Store
from dpo_score.storage.cache.location import cache_folder
from dpo_score.storage.file_hashes import FileDigests
from dpo_score.storage.manifest import Manifest
from dpo_score.tokenization.choose import REFERENCE, Home, choose_processor, choose_tokenizer, renderer_of
from dpo_score.tokenization.render import Renderer
from dpo_score.tokenization.rewardbench import text_of
from dpo_score.tokenization.tokenizer import TOKENIZER_FILES

PIPELINE = "pipeline.yaml"
CONSENT = ("allow_pickle", "trust_remote_code")


@dataclass(frozen=True, slots=True, eq=False)
class TextSource:
    """The data of a run as they were when it was scored."""

    config: RunConfig
    datasets: tuple[Dataset, ...]

    def pairs(self, row_ids: Iterable[str]) -> dict[str, Pair]:
        """row_id → pair, for those rows that still give one."""
        wanted = set(row_ids)
        return {row_id: pair for found in self.batches(wanted, len(wanted) + 1) for row_id, pair in found.items()}

    def batches(self, row_ids: Iterable[str], size: int) -> Iterator[dict[str, Pair]]:
        """As `pairs`, for about `size` rows at a time, in the order of the data: for more than fit into memory."""
        wanted = set(row_ids)
        rows = self.rows(wanted)
        for start in range(0, len(rows), size):
            found = read_rows_at(self.datasets, rows[start : start + size])
            yield {
                item.source.row_id: item for item in found if isinstance(item, Pair) and item.source.row_id in wanted
            }

    def rows(self, row_ids: Iterable[str]) -> list[int]:
        """The numbers of the rows that these ids come from, ascending, each once."""
        return sorted(set(self.row_of_each(row_ids)))

    def row_of_each(self, row_ids: Iterable[str]) -> list[int]:
        """The number, among the rows of all sets, of the row that each id comes from."""
        offsets = self._offsets()
        return [self._position(row_id, offsets) for row_id in row_ids]

    def _offsets(self) -> dict[int, tuple[int, DataFile]]:
        """File index → rows (as the run counts them) before the file, and the file."""
        offsets, before = {}, 0
        for dataset in self.datasets:
            for file in dataset.files:
                offsets[file.index] = (before, file)
                before += file.rows
        return offsets

    @staticmethod
    def _position(row_id: str, offsets: Mapping[int, tuple[int, DataFile]]) -> int:
        index, row = row_place(row_id)[:2]
        before, file = offsets[index]
        return before + file.unit_of(row)


def stored_config(store: Store, allowed: Collection[str] = ()) -> RunConfig:
    """The configuration that a run resolved, from OUT/pipeline.yaml. Raises UsageError where there is none.

    OUT may come from somebody else: what its run was allowed (CONSENT) is not allowed here, but for `allowed`.
    """
    if not store.exists(PIPELINE):
        raise UsageError(f"{store.url(PIPELINE)} does not exist: the run has not finished yet")
    found = load_config(str(store.local_copy(PIPELINE)), {}, environment={})
    return found.model_copy(update={name: name in allowed for name in CONSENT})


def text_source(store: Store, manifest: Manifest, remember: bool = True) -> TextSource | str:
    """The data of a run, or in one sentence why their texts cannot be shown.

    remember: keep the digests of the files under the cache folder that the run had.
    """
    try:
        config = with_secrets_again(stored_config(store), store.url(PIPELINE))
        digests = FileDigests(cache_folder(config.cache_dir)).sha256 if remember else None
        datasets = open_data(config, sha256=digests)
    except (UsageError, DamageError) as error:
        return f"the data cannot be read again: {error}"
    now = {dataset.spec.name: dataset.fingerprint() for dataset in datasets}
    if json.loads(json.dumps(now)) != manifest.identities.text.get("data"):
        return "the data files are not those that were scored: they have changed since"
    return TextSource(config, datasets)


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """Pairs → tokens. `tokenizer` is None for sets that hold token ids."""

    tokenizer: Any
    renderer: Renderer

    def encode(self, pair: Pair) -> EncodedPair | Rejected:
        return self.renderer.encode([pair])[0]


def make_reader(
    config: RunConfig, datasets: Sequence[Dataset], date: str | None = None, say: Callable[[str], None] = no_progress
) -> Reader:
    """What turns pairs into ids, as a run makes it. `date`: the one that a run fixed. Raises UsageError."""
    text = text_of(config.rewardbench, config.text) if config.rewardbench else config.text
    text = text if date is None else text.model_copy(update={"date": date})
    first = _lender(config)
    homes = () if first is None else chain([first.home], _homes(config))
    limits = None if first is None else text_limits(first.config, text.max_length)
    processor = choose_processor(config, text, datasets, (folder for _, folder in homes))
    tokenizer = processor.tokenizer if processor else choose_tokenizer(config, text, datasets, homes, say)
    return Reader(tokenizer, renderer_of(config, tokenizer, text, limits, processor))


@dataclass(frozen=True, slots=True)
class _Lender:
    """The model whose tokenizer is used, and whose configuration says what it takes."""

    home: Home
    config: Mapping[str, Any]


def _lender(config: RunConfig) -> _Lender | None:
    """The reference, else the first policy that resolves. A folder's weights are looked at where they have to be."""
    spec = config.reference
    if spec is not None and spec.columns is None and spec.adapter is None:
        folder = locate(spec.model, revision=spec.revision, allow_pickle=config.allow_pickle).path
        if folder.is_dir() and any((folder / name).is_file() for name in TOKENIZER_FILES):
            return _Lender((REFERENCE, str(folder)), _config_of(folder))
    return next((_Lender(_home(name, source), source.config) for name, source in _resolved(config)), None)


def _config_of(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    found: Mapping[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _home(name: str, source: ModelSource) -> Home:
    return name, str(source.tokenizer_folder)


def _homes(config: RunConfig) -> Iterator[Home]:
    return (_home(name, source) for name, source in _resolved(config))


def _resolved(config: RunConfig) -> Iterator[tuple[str, ModelSource]]:
    """The reference and the policies that resolve, in full, one by one. ModelError where there are only others."""
    resolver = Resolver.of(config)
    spec, reference = config.reference, None
    if spec is not None and spec.columns is None:
        reference = resolver.resolve_spec(spec)
        yield REFERENCE, reference
    failures = []
    for policy in config.policies:
        try:
            yield policy.name, resolve_policy(policy, reference, config.policy_base, resolver)
        except ModelError as error:
            failures.append(error)
    if failures and reference is None and len(failures) == len(config.policies):
        raise failures[0]


def stored_reader(source: TextSource, manifest: Manifest) -> Reader | str:
    """The reader of a run, or in one sentence why there is none now."""
    try:
        return make_reader(source.config, source.datasets, manifest.notes.get("date"))
    except DpoScoreError as error:
        return f"the tokenizer cannot be read again: {error}"


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token: what decoding gains by it. Bytes of one character go to the token that completes it."""
    texts, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        before = _decoded(tokenizer, ids[start:read])
        now = _decoded(tokenizer, ids[start:end])
        if now.endswith("�") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = read, end
    return texts


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    if not len(ids):
        return ""
    text: str = tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def plain_text(text: Text) -> str:
    """A side as one string: an answer as it is, several messages with their roles."""
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0].get("role") == "assistant" and isinstance(text[0].get("content"), str | tuple):
        return shown_content(text[0]["content"])
    return "\n\n".join(f"{message.get('role', '?')}: {_content(message)}" for message in text)


def shown_content(content: str | tuple[Mapping[str, Any], ...]) -> str:
    """A text, or the texts of parts with [picture] where a picture stands."""
    if isinstance(content, str):
        return content
    return "".join("[picture] " if part["type"] == "image" else part["text"] for part in content)


def _content(message: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    content = message.get("content")
    text = shown_content(content) if isinstance(content, str | tuple) else None
    shown = text if text is not None else json.dumps(content, ensure_ascii=False, default=str)
    return f"{shown} {json.dumps(rest, ensure_ascii=False, default=str)}" if rest else shown
