"""One tokenizer for all models of a run: chosen once, and a model is refused when an id means another token to it.

A padded embedding is no difference; an id beyond the embedding, or one that stands for another token, is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_score.config import RunConfig
from dpo_score.errors import ModelError
from dpo_score.logps.limits import embedding_rows
from dpo_score.logps.source import ModelSource
from dpo_score.pairs.tokenizer import load_tokenizer, same_ids


def choose_tokenizer(
    config: RunConfig, first: ModelSource | None, policies: Mapping[str, ModelSource | str], say: Callable[[str], None]
) -> Any:
    """--tokenizer, else that of `first`; None where there is neither.

    Where a chat template is asked for and that one has none, as base models have not, the first policy's that has.
    """
    name = config.text.tokenizer or (str(first.tokenizer_folder) if first else None)
    found = load_tokenizer(name, trust_remote_code=config.trust_remote_code) if name else None
    if found is None or found.chat_template or config.text.tokenizer or config.text.chat_template:
        return found
    sources = {name: source for name, source in policies.items() if isinstance(source, ModelSource)}
    for name, source in sources.items() if config.text.render == "chat" else ():
        other = load_tokenizer(str(source.tokenizer_folder), trust_remote_code=config.trust_remote_code)
        if other.chat_template:
            say(f"the reference's tokenizer has no chat template: that of {name} is used")
            return other
    return found


class TokenGuard:
    """Checks the ids of each block against one model, each id once."""

    def __init__(self, tokenizer: Any, source: ModelSource | None) -> None:
        self._tokenizer, self._source = tokenizer, source
        self._rows = embedding_rows(source) if source else 0
        self._seen: set[int] = set()
        self._own: Any = None

    def check(self, table: pa.Table) -> None:
        """ModelError naming the first three ids that do not fit."""
        if self._source is None:
            return
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
