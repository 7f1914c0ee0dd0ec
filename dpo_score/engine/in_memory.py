"""Pairs and models that a program has in memory: scored into a table, without an output folder.

The numbers and columns are those of a run, on one block. Models named by path use the cache. Loaded models do not
(nothing says what their weights are), are not copied, and are left as they were found: training modes, gradient flags
and the active adapter.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_score.config.schema import ComputeSpec, RunConfig
from dpo_score.data.dataset import PairReader
from dpo_score.data.pictures import with_files
from dpo_score.data.types import TokenSequence, row_place
from dpo_score.engine.block_inputs import BlockText, TextPlan, encoded_block
from dpo_score.engine.context import RunContext, open_context
from dpo_score.engine.limits import TokenGuard, refuse_long, refuse_other_kind
from dpo_score.engine.model_logprobs import CachedLogprobs, Computed, LogprobSource, Lookup, with_slower_way
from dpo_score.engine.plan import PolicyTask, RowBlocks, RunPlan, Task
from dpo_score.engine.prepare import resolve_plan
from dpo_score.engine.progress import Progress
from dpo_score.engine.run import BlockSteps
from dpo_score.engine.stages import BlockResult
from dpo_score.errors import ConfigError, DataError, ModelError
from dpo_score.logprobs.numerics import resolve_numerics
from dpo_score.models.numerics import Numerics
from dpo_score.models.resolve import ModelSource
from dpo_score.results.schemas import STATS
from dpo_score.storage.open import open_store
from dpo_score.storage.parquet import fitted
from dpo_score.tokenization.pictures import PictureInputs

T = TypeVar("T")


def written(pairs: Any, folder: Path) -> Path:
    """`pairs` as a file in `folder`: a pandas, polars or Arrow table, a datasets.Dataset, or an iterable of dicts."""
    path = folder / "pairs.parquet"
    if hasattr(pairs, "to_arrow"):  # polars
        pairs = pairs.to_arrow()
    elif hasattr(pairs, "iloc"):  # pandas
        pairs = pa.Table.from_pandas(pairs, preserve_index=False)
    elif hasattr(pairs, "__arrow_c_stream__"):  # Arrow, whoever made it
        pairs = pa.table(pairs)
    if isinstance(pairs, pa.Table):
        pq.write_table(pairs, path)
    elif hasattr(pairs, "to_parquet"):  # datasets
        pairs.to_parquet(str(path))
    elif isinstance(pairs, Sequence) and any(_has_picture(row) for row in pairs):
        cells = [{name: with_files(value) for name, value in _row(row).items()} for row in pairs]
        pq.write_table(pa.Table.from_pylist(cells), path)
    elif isinstance(pairs, Iterable) and not isinstance(pairs, str | bytes | Mapping):
        path = path.with_suffix(".jsonl")
        path.write_text("".join(f"{json.dumps(_row(row), default=_plain)}\n" for row in pairs), encoding="utf-8")
    else:
        raise DataError(
            f"pairs is a {type(pairs).__name__}: give a path, a table (pandas, polars, Arrow, datasets) or dicts"
        )
    return path


def _has_picture(row: Any) -> bool:
    """Whether a row holds a PIL image, or the bytes of a picture."""
    values = [*row.values()] if isinstance(row, Mapping) else []
    flat = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    return any(isinstance(item, bytes) or hasattr(item, "getexif") for item in flat)


def kept_table(pairs: Any, cache: Path) -> str:
    """`pairs` as a file of the cache that is named after its content: the same table is the same file."""
    with tempfile.TemporaryDirectory(prefix="dpo-score-") as folder:
        made = written(pairs, Path(folder))
        content = made.read_bytes()
    store = open_store(cache)
    name = f"tables/{hashlib.sha256(content).hexdigest()[:32]}/{made.name}"
    if not store.exists(name):
        store.write_bytes(name, content)
    return store.url(name)


def _row(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"pairs holds a {type(row).__name__}: each row must be a dict with columns by name")
    return row


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise DataError(f"pairs holds a {type(value).__name__}, which is not text, a number, a list or a dict")


def loaded_models(policies: Mapping[str, Any], reference: Any) -> dict[str, InMemoryModel]:
    """The models among policies and reference that are objects, not names; "" is the reference."""
    loaded = {name: InMemoryModel(model) for name, model in policies.items() if not isinstance(model, str | Path)}
    if reference == "base" and len(loaded) != 1:
        raise ConfigError('reference "base": give one loaded PEFT model as the policy, whose base is meant')
    if reference == "base":
        loaded[""] = InMemoryModel(next(iter(loaded.values())).model, bare=True)
    elif reference is not None and not isinstance(reference, str | Path):
        loaded[""] = InMemoryModel(reference)
    return loaded


def scored_tables(
    config: RunConfig, progress: Progress, folder: Path, loaded: Mapping[str, InMemoryModel], tokenizer: Any = None
) -> dict[str, pa.Table]:
    """Policy → score columns, a row for every pair in the order of the input; `status` says which were scored.

    `folder`: for files of this call alone. `loaded`: models by policy name, "" being the reference; all others are
    named in `config`. Rows that could not be scored are null but for where they come from. Raises UsageError.
    """
    context = open_context(config, progress, open_store(folder / "out"))
    plan = resolve_plan(config, context, in_memory=loaded, tokenizer=tokenizer)
    for policy in plan.policies:
        if policy.failure is not None:
            raise ModelError(policy.failure.reason)
    plan = replace(plan, rows=RowBlocks(plan.rows.total, max(plan.rows.total, 1)))
    text = encoded_block(TextPlan.of(plan), PairReader(plan.datasets), 0)
    for task in plan.tasks:
        _refuse_misfit(plan, task, text, is_loaded=task.name in loaded)
    reference = plan.references[0]

    first = _scored(context, plan, reference, loaded.get(""), text, {})
    tables = {}
    for policy in plan.policies:
        result = _scored(context, plan, policy, loaded.get(policy.name), text, first.tables)
        tables[policy.name] = _in_order(result.tables[policy.stage.part(0, 1)], first, result)
    return tables


def _refuse_misfit(plan: RunPlan, task: Task, text: BlockText, is_loaded: bool) -> None:
    """ModelError for rows that a model cannot take, before anything is computed."""
    refuse_other_kind(plan.renderer, task.source)
    if task.source is None:
        return
    if is_loaded:
        refuse_long(task.source, text.table, plan.config.text.max_length)
    else:
        TokenGuard(plan.tokenizer, task.source, plan.config.text.max_length).check(text.table)


def _scored(
    context: RunContext,
    plan: RunPlan,
    task: Task,
    loaded: InMemoryModel | None,
    text: BlockText,
    stored: Mapping[str, pa.Table],
) -> BlockResult:
    """The tables of a task's only block. `stored`: those of the reference, for a policy."""

    def scored(logprobs: LogprobSource | None) -> BlockResult:
        steps = BlockSteps(plan, task, logprobs, lambda block: stored[plan.references[0].stage.part(block, 1)])
        block = steps.prepare(text)
        return steps.result(block, steps.compute(block))

    source, numerics = task.source, task.numerics
    if source is None or numerics is None or (isinstance(task, PolicyTask) and task.equals_reference):
        return scored(None)
    stats = [STATS[name] for name in plan.stats]
    if loaded is not None:
        return scored(InMemoryLogprobs(loaded, numerics, stats, plan.pictures))
    return with_slower_way(
        context.progress,
        source.name,
        numerics,
        lambda path: scored(CachedLogprobs(context, source, path, stats, pictures=plan.pictures)),
    )


def _in_order(scores: pa.Table, *results: BlockResult) -> pa.Table:
    """Scores and the rejected rows of both stages, in the order of the input."""
    rejects = [t for found in results for name, t in found.tables.items() if name.startswith("rejects/")]
    origin = ["row_id", "dataset", "source_file", "source_row"]
    lost = [table.select(origin).append_column("status", table["code"]) for table in rejects if table.num_rows]
    together = pa.concat_tables([scores, *(fitted(table, scores.schema) for table in lost)])
    places = [row_place(row_id) for row_id in together["row_id"].to_pylist()]
    order = sorted(range(together.num_rows), key=places.__getitem__)
    return together.take(pa.array(order, pa.int64()))


# --- loaded models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class InMemoryModel:
    """A transformers or PEFT model; `bare`: with its adapters switched off."""

    model: Any
    bare: bool = False

    @property
    def source(self) -> ModelSource:
        """A source without files: equal exactly for the same object in the same guise."""
        digest = f"held:{id(self.model)}:{'bare' if self.bare else 'as it is'}"
        name = type(self.model).__name__
        return ModelSource(name, Path(), None, None, self.model.config.to_dict(), (), digest, digest, False)

    def numerics(self, compute: ComputeSpec, pictures: PictureInputs | None = None) -> Numerics:
        """The model's own dtype and device, and the path that proves right on it."""
        from dpo_score.logprobs.self_check import check_model

        own = {"device": str(self.model.device), "dtype": str(self.model.dtype).removeprefix("torch.")}
        size = sum(parameter.numel() for parameter in self.model.parameters())
        asked = resolve_numerics(compute.model_copy(update=own), self.model.config.to_dict(), size)
        with self.as_found():
            return check_model(self.model, replace(asked, compile=False), pictures).numerics

    @property
    def tokenizer_home(self) -> str:
        """The folder or hub id of its tokenizer; empty where the model does not say."""
        return getattr(self.model.config, "name_or_path", None) or getattr(self.model, "name_or_path", None) or ""

    @contextmanager
    def as_found(self) -> Iterator[None]:
        """Evaluation mode, adapters off where `bare`; everything put back afterwards."""
        if self.bare and not hasattr(self.model, "disable_adapter"):
            raise ModelError("reference 'base': the policy is no PEFT model, so it has no adapters to switch off")
        modes = [(module, module.training) for module in self.model.modules()]
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with self.model.disable_adapter() if self.bare else nullcontext():
                self.model.eval()
                yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


class InMemoryLogprobs:
    """Log-probs of one loaded model."""

    def __init__(
        self,
        loaded: InMemoryModel,
        numerics: Numerics,
        stats: Sequence[str] = (),
        pictures: PictureInputs | None = None,
    ) -> None:
        self._loaded, self._numerics, self._stats, self._pictures = loaded, numerics, tuple(stats), pictures

    def look_up(self, sequences: Sequence[TokenSequence]) -> Lookup:
        """Nothing is known."""
        self._refuse_unknown_ids(sequences)
        return Lookup(sequences, [sequence.key for sequence in sequences])

    def compute(self, lookup: Lookup, sample: int = 0) -> Computed:
        from dpo_score.logprobs.scorer import PairScorer

        with self._loaded.as_found():
            results = PairScorer(self._loaded.model, self._numerics, self._stats, pictures=self._pictures).score(
                lookup.sequences
            )
        return Computed(lookup, dict(zip(lookup.keys, results, strict=True)))

    def keep(self, name: str, computed: Computed) -> None:
        """Nothing is kept: nobody could say what these weights are."""

    def _refuse_unknown_ids(self, sequences: Sequence[TokenSequence]) -> None:
        rows = int(self._loaded.model.get_input_embeddings().weight.shape[0])
        largest = max((int(ids.max()) for s in sequences for ids in (s.prompt, s.response) if len(ids)), default=0)
        if largest >= rows:
            raise ModelError(
                f"{type(self._loaded.model).__name__}: token id {largest} lies beyond its {rows} embedding rows; it "
                "was made for another tokenizer: name its own with tokenizer=…"
            )
