"""Whether a model can take the rows of a run: they were cut to the reference's limit, and a policy's may be shorter.

Promises: no model is given more tokens than its positions allow, unless a `--max-length` beyond what it is made for was
asked for by name and it can compute them: that is said, with what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo_score.engine.context import RunContext
from dpo_score.engine.plan import PolicyTask, RunPlan
from dpo_score.errors import ModelError
from dpo_score.models.limits import embedding_rows, length_warning, text_limits
from dpo_score.models.resolve import ModelSource
from dpo_score.results.schemas import ID_NAMES, SIDES
from dpo_score.storage.commits import read_records, record_name
from dpo_score.tokenization.encoder_decoder import EncoderDecoderRenderer
from dpo_score.tokenization.render import Renderer
from dpo_score.tokenization.tokenizer import load_tokenizer, same_ids
from dpo_score.tokenization.truncation import SideLimits

COUNTS = ("row_id", "prompt_tokens", "chosen_tokens", "rejected_tokens")


def bounds(source: ModelSource, max_length: int | None = None) -> Mapping[str, int | None]:
    """What a model bounds in a row, and by how many tokens: the keys are those of its renderer's `bounds`.

    `max_length`: as asked for by name; rows of that length are scored where the model can compute them.
    """
    own = text_limits(source.config, max_length)
    return {"prompt": own.prompt, "answer": own.answer} if isinstance(own, SideLimits) else {"prompt and answer": own}


def warn_of_lengths(sources: Iterable[ModelSource], max_length: int | None, warn: Callable[[str], object]) -> None:
    """Say, once for each model, what a `--max-length` beyond its own limit means."""
    for text in dict.fromkeys(length_warning(source, max_length) for source in sources):
        if text is not None:
            warn(text)


def refuse_other_kind(renderer: Renderer, source: ModelSource | None) -> None:
    """ModelError for an encoder-decoder where rows were made for other models, and the other way round."""
    if source is not None and source.is_encoder_decoder != isinstance(renderer, EncoderDecoderRenderer):
        raise ModelError(
            f"{source.name} {'is' if source.is_encoder_decoder else 'is not'} an encoder-decoder, unlike the model "
            "that the rows were tokenised for: score it in a run of its own, with a reference of its kind"
        )


def refuse_long(source: ModelSource, table: pa.Table, max_length: int | None = None) -> None:
    """ModelError naming the longest row of `table` where it is more than the model takes."""
    sizes = _sizes(table)
    for what, limit in bounds(source, max_length).items():
        longest = int(np.argmax(sizes[what])) if table.num_rows else -1
        if limit is None or longest < 0 or sizes[what][longest] <= limit:
            continue
        raise ModelError(
            f"{source.name} takes {limit:,} tokens of {what} at most, but row {table['row_id'][longest]} has "
            f"{sizes[what][longest]:,}: say --max-length {limit} to cut the rows for every model of the run, or score "
            "it in a run of its own"
        )


def _sizes(table: pa.Table) -> dict[str, NDArray[Any]]:
    """Tokens of every row. Without the ids, the tokens that are scored: at most as many."""
    if set(ID_NAMES) <= set(table.column_names):
        found = [pc.list_value_length(table[f"{name}_ids"]) for name in ("prompt", *SIDES)]
    else:
        found = [table[f"{name}_tokens"] for name in ("prompt", *SIDES)]
    prompt, chosen, rejected = (np.asarray(column) for column in found)
    answer = np.maximum(chosen, rejected)
    return {"prompt": prompt, "answer": answer, "prompt and answer": prompt + answer}


def refuse_unfit(context: RunContext, plan: RunPlan, policy: PolicyTask) -> None:
    """ModelError for a policy that cannot take what stage one has committed, before a row of it is scored."""
    source = policy.source
    if source is None or policy.equals_reference:
        return
    refuse_other_kind(plan.renderer, source)
    asked = plan.config.text.max_length
    if not _shorter(bounds(source, asked), plan.renderer.bounds):
        return
    done, blocks = read_records(context.store, policy.stage.name), plan.rows.blocks
    for block in context.stop.between(plan.rows):
        if record_name(policy.stage.name, block, blocks) not in done:
            table = context.store.read_table(policy.reference.stage.part(block, blocks), list(COUNTS))
            refuse_long(source, table, asked)


def _shorter(own: Mapping[str, int | None], cut_to: Mapping[str, int | None]) -> bool:
    """Whether a row that was cut to `cut_to` may be more than `own` allows."""
    limits = ((own[what], cut_to[what]) for what in own)
    return any(most is not None and (there is None or there > most) for most, there in limits)


class TokenGuard:
    """Checks each block against one model: the length of its rows, and their ids, each id once."""

    def __init__(self, tokenizer: Any, source: ModelSource | None, max_length: int | None = None) -> None:
        self._tokenizer, self._source, self._max_length = tokenizer, source, max_length
        self._rows = embedding_rows(source) if source else 0
        self._seen: set[int] = set()
        self._own: Any = None

    def check(self, table: pa.Table) -> None:
        """ModelError naming the first three ids that do not fit, or the row that is too long."""
        if self._source is None:
            return
        refuse_long(self._source, table, self._max_length)
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
