"""One tokenizer for all models of a run: chosen once, and a model is refused when an id means another token to it.

A padded embedding is no difference; an id beyond the embedding, or one that stands for another token, is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_score.config.schema import RunConfig, TextSpec
from dpo_score.data.dataset import Dataset
from dpo_score.engine.limits import refuse_long
from dpo_score.engine.plan import is_conversational, only_ids
from dpo_score.errors import ConfigError, ModelError
from dpo_score.models.limits import context_limit, embedding_rows, side_limits
from dpo_score.models.resolve import TOKENIZER_FILES, ModelSource
from dpo_score.tokenization.encoder_decoder import EncoderDecoderRenderer
from dpo_score.tokenization.render import Renderer
from dpo_score.tokenization.rewardbench import make_renderer
from dpo_score.tokenization.tokenizer import load_tokenizer, same_ids

Home = tuple[str, str]
"""What a model is called, and the folder or hub id of its tokenizer."""


REFERENCE = "the reference"


def homes_of(models: Mapping[str, ModelSource | str | None]) -> Iterator[Home]:
    """Where the tokenizers of those models are that resolve."""
    return ((name, str(model.tokenizer_folder)) for name, model in models.items() if isinstance(model, ModelSource))


def choose_tokenizer(
    config: RunConfig, text: TextSpec, datasets: Sequence[Dataset], homes: Iterable[Home], say: Callable[[str], None]
) -> Any:
    """--tokenizer, else that of the first model of `homes`; None where nothing needs one and there is none.

    Where a chat template is called for and that one has none, as base models have not, the first of the others' that
    has. `homes` is read no further than needed.
    """
    homes = iter(homes)
    named = [("--tokenizer", text.tokenizer)] if text.tokenizer else homes
    label, name = next(iter(named), ("", ""))
    if not name or (only_ids(datasets) and not text.tokenizer and not _may_have_one(name)):
        return None
    found = load_tokenizer(name, trust_remote_code=config.trust_remote_code)
    if found.chat_template or text.tokenizer or text.chat_template or not _asks_for_template(text, datasets):
        return found
    others = (home for home in homes if home[1] != name and _may_have_one(home[1]))
    return _with_template(others, label, config.trust_remote_code, say) or found


def _asks_for_template(text: TextSpec, datasets: Sequence[Dataset]) -> bool:
    return text.render == "chat" or (text.render == "auto" and any(map(is_conversational, datasets)))


def _with_template(homes: Iterator[Home], label: str, trust: bool, say: Callable[[str], None]) -> Any:
    """The first tokenizer that has a chat template, said aloud; None where none has."""
    for name, folder in homes:
        try:
            other = load_tokenizer(folder, trust_remote_code=trust)
        except ModelError:
            continue  # a policy's own trouble, which is told when that policy is scored
        if other.chat_template:
            say(f"the tokenizer of {label} has no chat template: that of {name} is used")
            return other
    return None


def _may_have_one(name: str) -> bool:
    """Whether there is a tokenizer: a folder shows it, a hub id is asked."""
    folder = Path(name)
    return not folder.is_dir() or any((folder / file).is_file() for file in (*TOKENIZER_FILES, "tokenizer_config.json"))


def renderer_of(config: RunConfig, tokenizer: Any, text: TextSpec, model: Mapping[str, Any] | None) -> Renderer:
    """What makes ids for a model with this configuration, within its limits. None: values that stand in the data."""
    if model is None or not model.get("is_encoder_decoder"):
        return make_renderer(config.rewardbench, tokenizer, text, context_limit(model) if model else None)
    if config.rewardbench == "exact":
        raise ConfigError("--rewardbench exact scores causal models, and this one is an encoder-decoder: say corrected")
    return EncoderDecoderRenderer(tokenizer, text, side_limits(model))


class TokenGuard:
    """Checks each block against one model: the length of its rows, and their ids, each id once."""

    def __init__(self, tokenizer: Any, source: ModelSource | None) -> None:
        self._tokenizer, self._source = tokenizer, source
        self._rows = embedding_rows(source) if source else 0
        self._seen: set[int] = set()
        self._own: Any = None

    def check(self, table: pa.Table) -> None:
        """ModelError naming the first three ids that do not fit, or the row that is too long."""
        if self._source is None:
            return
        refuse_long(self._source, table)
        new = used_ids(table) - self._seen
        beyond = sorted(i for i in new if i >= self._rows)[:3]
        if beyond:
            raise ModelError(
                f"{self._source.name}: token ids {beyond} lie beyond its {self._rows} embedding rows: it was made for "
                "another tokenizer. Score it in a run of its own, with its own reference or --tokenizer"
            )
        self._compare(new)
        self._seen |= new

    def _compare(self, new: set[int]) -> None:
        own = self._own_tokenizer()
        if own is None or self._tokenizer is None or self._source is None:
            return
        differing = same_ids(self._tokenizer, own, np.array(sorted(new), np.int64))
        if differing:
            shown = "; ".join(f"id {i}: {a!r} here, {b!r} there" for i, a, b in differing)
            raise ModelError(
                f"{self._source.name} was made for another tokenizer: {shown}. Score it in a run of its own, with a "
                "reference of the same family, or name the tokenizer of both with --tokenizer"
            )

    def _own_tokenizer(self) -> Any:
        """The model's own tokenizer; None where its folder has none (a bare checkpoint follows the run's)."""
        if self._own is None and self._source is not None:
            folder = self._source.tokenizer_folder
            same = self._tokenizer is None or str(folder) == str(getattr(self._tokenizer, "name_or_path", ""))
            has_one = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
            self._own = load_tokenizer(str(folder)) if has_one and not same else False
        return self._own or None


def used_ids(table: pa.Table) -> set[int]:
    """Every token id of a text table."""
    found: set[int] = set()
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        for chunk in table[name].chunks:
            found.update(np.unique(chunk.flatten().to_numpy(zero_copy_only=False)).tolist())
    return found
