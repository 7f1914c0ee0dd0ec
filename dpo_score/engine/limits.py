"""Whether a model can take the rows of a run: they were cut to the reference's limit, and a policy's may be shorter.

Promises: no model is given more tokens than its positions allow. Learned positions would fail inside it, and rotary
ones would score places that it was never trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo_score.engine.context import Desk
from dpo_score.engine.plan import Job, PolicyJob
from dpo_score.engine.stages import part
from dpo_score.errors import ModelError
from dpo_score.models.limits import context_limit, side_limits
from dpo_score.models.resolve import ModelSource
from dpo_score.results.schemas import ID_NAMES, SIDES
from dpo_score.storage.commits import read_records, record_name
from dpo_score.tokenization.encoder_decoder import EncoderDecoderRenderer
from dpo_score.tokenization.render import Renderer

COUNTS = ("row_id", "prompt_tokens", "chosen_tokens", "rejected_tokens")


def bounds(source: ModelSource) -> Mapping[str, int | None]:
    """What a model bounds in a row, and by how many tokens: the keys are those of its renderer's `bounds`."""
    if not source.is_encoder_decoder:
        return {"prompt and answer": context_limit(source.config)}
    own = side_limits(source.config)
    return {"prompt": own.prompt, "answer": own.answer}


def refuse_other_kind(renderer: Renderer, source: ModelSource | None) -> None:
    """ModelError for an encoder-decoder where rows were made for other models, and the other way round."""
    if source is not None and source.is_encoder_decoder != isinstance(renderer, EncoderDecoderRenderer):
        raise ModelError(
            f"{source.name} {'is' if source.is_encoder_decoder else 'is not'} an encoder-decoder, unlike the model "
            "that the rows were tokenised for: score it in a run of its own, with a reference of its kind"
        )


def refuse_long(source: ModelSource, table: pa.Table) -> None:
    """ModelError naming the longest row of `table` where it is more than the model takes."""
    sizes = _sizes(table)
    for what, limit in bounds(source).items():
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


def refuse_unfit(desk: Desk, job: Job, policy: PolicyJob) -> None:
    """ModelError for a policy that cannot take what stage one has committed, before a row of it is scored."""
    source = policy.source
    if source is None or policy.equals_reference:
        return
    refuse_other_kind(job.renderer, source)
    if not _shorter(bounds(source), job.renderer.bounds):
        return
    done, blocks = read_records(desk.store, policy.stage), job.rows.blocks
    for block in desk.stop.between(job.rows):
        if record_name(policy.stage, block, blocks) not in done:
            refuse_long(source, desk.store.read_table(part(policy.reference.stage, block, blocks), list(COUNTS)))


def _shorter(own: Mapping[str, int | None], cut_to: Mapping[str, int | None]) -> bool:
    """Whether a row that was cut to `cut_to` may be more than `own` allows."""
    limits = ((own[what], cut_to[what]) for what in own)
    return any(most is not None and (there is None or there > most) for most, there in limits)
