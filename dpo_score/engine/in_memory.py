"""Pairs from memory, scored into a table in memory: the stages of a run on one block, without OUT.

Promises: the numbers and columns are those of a run; models named by path use the cache, held ones do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_score.config.schema import ComputeSpec, PolicySpec, RunConfig
from dpo_score.data.dataset import Dataset, PairReader, only_ids, open_data
from dpo_score.data.types import EncodedPair, Pair, Rejected, TokenSequence, row_place
from dpo_score.engine.block_inputs import BlockText
from dpo_score.engine.context import RunContext
from dpo_score.engine.limits import TokenGuard, refuse_long, refuse_other_kind, warn_of_lengths
from dpo_score.engine.model_logprobs import (
    BlockLogprobs,
    CachedLogprobs,
    FastPathRefusedError,
    Values,
    trusted,
    way_in_words,
)
from dpo_score.engine.plan import PolicyTask, ReferenceTask, RowBlocks, RunPlan, extra_fields
from dpo_score.engine.prepare import parameters
from dpo_score.engine.stages import BlockResult, part, policy_block, reference_block
from dpo_score.errors import ConfigError, DataError, ModelError
from dpo_score.logprobs.numerics import resolve_numerics
from dpo_score.logprobs.types import SequenceLogps, Unscored
from dpo_score.losses.parse import parse_loss
from dpo_score.models.limits import text_limits
from dpo_score.models.numerics import Numerics
from dpo_score.models.resolve import ModelSource, Resolver, resolve_policy
from dpo_score.results.schemas import STATS, text_table
from dpo_score.storage.cache.cache import CacheEntry
from dpo_score.storage.fingerprint import Identities
from dpo_score.storage.parquet import fitted
from dpo_score.tokenization.choose import REFERENCE, choose_tokenizer, renderer_of

Model: TypeAlias = "ModelSource | InMemoryModel"


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
    elif isinstance(pairs, Iterable) and not isinstance(pairs, str | bytes | Mapping):
        path = path.with_suffix(".jsonl")
        path.write_text("".join(f"{json.dumps(_row(row), default=_plain)}\n" for row in pairs), encoding="utf-8")
    else:
        raise DataError(
            f"pairs is a {type(pairs).__name__}: give a path, a table (pandas, polars, Arrow, datasets) or dicts"
        )
    return path


def _row(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"pairs holds a {type(row).__name__}: each row must be a dict with columns by name")
    return row


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise DataError(f"pairs holds a {type(value).__name__}, which is not text, a number, a list or a dict")


@dataclass(frozen=True, slots=True)
class Participants:
    """Models by policy name ("" is the reference; absent where there is none), and their numerics."""

    models: Mapping[str, Model]
    numerics: Mapping[str, Numerics]

    def source(self, name: str) -> ModelSource | None:
        model = self.models.get(name)
        return model.source if isinstance(model, InMemoryModel) else model


def scored_tables(
    config: RunConfig, context: RunContext, loaded: Mapping[str, InMemoryModel], tokenizer: Any = None
) -> dict[str, pa.Table]:
    """Policy → score columns, a row for every pair in the order of the input; `status` says which were scored.

    `held`: loaded models by policy name, "" being the reference; all others are named in `config`. Rows that could
    not be scored are null but for where they come from. Raises UsageError.
    """
    datasets = open_data(config, keep_columns=_kept(config))
    models = _resolved(config, context, loaded)
    taking_part = Participants(models, _numerics(config, context, models))
    tokenizer = tokenizer if tokenizer is not None else _tokenizer(config, context, datasets, models)
    plan = _plan(config, datasets, taking_part, tokenizer)
    text = _text(plan)
    values = {name: _values(context, plan, taking_part, name, text) for name in models}
    first = reference_block(plan, plan.references[0], text, values.get(""))
    return {policy.name: _policy_table(plan, policy, text, first, values) for policy in plan.policies}


def _kept(config: RunConfig) -> tuple[str, ...]:
    """Columns that the caller, the reference or a loss reads."""
    offsets = [parse_loss(policy.loss or config.loss).modifiers.offset_column for policy in config.policies]
    columns = (config.reference.columns or ()) if config.reference else ()
    return tuple(dict.fromkeys((*config.keep_columns, *columns, *(name for name in offsets if name))))


def _resolved(config: RunConfig, context: RunContext, loaded: Mapping[str, InMemoryModel]) -> dict[str, Model]:
    trust, how = (config.allow_pickle, config.trust_remote_code), config.compute.quantization
    resolver = Resolver(context.cache_dir, context.digests.sha256, *trust, quantization=how)
    found: dict[str, Model] = {}
    spec = config.reference
    if "" in loaded:
        found[""] = loaded[""]
    elif spec is not None and spec.columns is None:
        found[""] = resolver.resolve(spec.model, revision=spec.revision, adapter=spec.adapter)
    base = found.get("")
    for policy in config.policies:
        reference = base if isinstance(base, ModelSource) else None
        found[policy.name] = loaded.get(policy.name) or resolve_policy(policy, reference, config.policy_base, resolver)
    return found


def _numerics(config: RunConfig, context: RunContext, models: Mapping[str, Model]) -> dict[str, Numerics]:
    """Held models compute as they are; named ones alike, as the first of them needs."""
    named = [model for model in models.values() if isinstance(model, ModelSource)]
    common = None
    if named:
        asked = resolve_numerics(config.compute, named[0].config, parameters(named[0]))
        common = trusted(context, named[0], asked, any_dtype=config.compute.dtype == "auto")
    return {
        name: model.numerics(config.compute) if isinstance(model, InMemoryModel) else cast(Numerics, common)
        for name, model in models.items()
    }


def _tokenizer(config: RunConfig, context: RunContext, datasets: Sequence[Dataset], models: Mapping[str, Model]) -> Any:
    """As a run chooses it; a held model says by name where its own is."""
    sources = [model if isinstance(model, ModelSource) else model.source for model in models.values()]
    warn_of_lengths(sources, config.text.max_length, context.progress.warn)
    homes = [(name or REFERENCE, _home(model)) for name, model in models.items()]
    if not (config.text.tokenizer or homes[0][1] or only_ids(datasets)):
        raise ModelError("the loaded model does not say where its tokenizer is: give tokenizer=…")
    known = homes[:1] + [home for home in homes[1:] if home[1]]
    return choose_tokenizer(config, config.text, datasets, known, context.progress.say)


def _home(model: Model) -> str:
    """The folder or hub id of a model's tokenizer; empty where a held one does not say."""
    if isinstance(model, ModelSource):
        return str(model.tokenizer_folder)
    return getattr(model.model.config, "name_or_path", None) or getattr(model.model, "name_or_path", None) or ""


def _plan(config: RunConfig, datasets: tuple[Dataset, ...], taking_part: Participants, tokenizer: Any) -> RunPlan:
    length = config.text.max_length
    source, spec, rows = taking_part.source(""), config.reference, sum(dataset.rows for dataset in datasets)
    first = taking_part.source(next(iter(taking_part.models), ""))
    reference = ReferenceTask("", source, spec.columns if spec else None, taking_part.numerics.get(""), {}, "")
    policies = [_policy_task(config, policy, taking_part, reference) for policy in config.policies]
    return RunPlan(
        config=config,
        datasets=datasets,
        rows=RowBlocks(rows, max(rows, 1)),
        tokenizer=tokenizer,
        renderer=renderer_of(config, tokenizer, config.text, text_limits(first.config, length) if first else None),
        extra=extra_fields(datasets, _kept(config)),
        references=(reference,),
        policies=tuple(policies),
        identities=Identities({}),
        stats=tuple(dict.fromkeys((*config.compute.stats, *(["wpo"] if any(map(_weighs, policies)) else [])))),
    )


def _weighs(policy: PolicyTask) -> bool:
    return policy.loss.modifiers.wpo


def _policy_task(
    config: RunConfig, spec: PolicySpec, taking_part: Participants, reference: ReferenceTask
) -> PolicyTask:
    loss = spec.loss or config.loss
    source, numerics = taking_part.source(spec.name), taking_part.numerics[spec.name]
    resolved = parse_loss(loss)
    if reference.source is None and reference.columns is None and not resolved.reference_free:
        raise ConfigError(f"loss {resolved.name!r} compares with a reference: give reference=…")
    return PolicyTask(spec.name, source, resolved, loss, reference, numerics, {}, "")


def _text(plan: RunPlan) -> BlockText:
    read = PairReader(plan.datasets).read(0, plan.rows.total)
    encoded = plan.renderer.encode([item for item in read if isinstance(item, Pair)])
    rejected = tuple(item for item in [*read, *encoded] if isinstance(item, Rejected))
    pairs = [item for item in encoded if isinstance(item, EncodedPair)]
    return BlockText(0, 0, plan.rows.total, text_table(pairs, plan.extra), rejected)


def _values(context: RunContext, plan: RunPlan, taking_part: Participants, name: str, text: BlockText) -> Values:
    model, numerics, stats = taking_part.models[name], taking_part.numerics[name], [STATS[s] for s in plan.stats]
    refuse_other_kind(plan.renderer, taking_part.source(name))
    if isinstance(model, InMemoryModel):
        refuse_long(model.source, text.table, plan.config.text.max_length)
        return InMemoryLogprobs(model, numerics, stats)
    TokenGuard(plan.tokenizer, model, plan.config.text.max_length).check(text.table)
    return CheckedLogprobs(context, model, numerics, stats)


class CheckedLogprobs:
    """Values of one named model, on the plain path where the fast one is refused at its load, said aloud."""

    def __init__(self, context: RunContext, source: ModelSource, numerics: Numerics, stats: Sequence[str]) -> None:
        self._context, self._source, self._numerics, self._stats = context, source, numerics, stats
        self._values = CachedLogprobs(context, source, numerics, stats)

    def block(self, name: str, sequences: Sequence[TokenSequence], sample: int = 0) -> BlockLogprobs:
        try:
            return self._values.block(name, sequences, sample)
        except FastPathRefusedError as refusal:
            way = refusal.numerics
            self._context.progress.warn(f"{self._source.name}: {way_in_words(way)}, which is slower: {refusal}")
        self._values = CachedLogprobs(self._context, self._source, way, self._stats)
        return self._values.block(name, sequences, sample)


def _policy_table(
    plan: RunPlan, policy: PolicyTask, text: BlockText, first: BlockResult, values: Mapping[str, Values]
) -> pa.Table:
    """Scores and rejects of one policy, in the order of the rows."""
    own = None if policy.equals_reference else values[policy.name]
    result = policy_block(plan, policy, text, first.tables[part("reference", 0, 1)], own)
    scores = result.tables[part(policy.stage, 0, 1)]
    rejects = [t for found in (first, result) for name, t in found.tables.items() if name.startswith("rejects/")]
    rows = [fitted(_unscored(table), scores.schema) for table in rejects if table.num_rows]
    together = pa.concat_tables([scores, *rows])
    order = sorted(range(together.num_rows), key=list(map(row_place, together["row_id"].to_pylist())).__getitem__)
    return together.take(pa.array(order, pa.int64()))


def _unscored(rejects: pa.Table) -> pa.Table:
    return rejects.select(["row_id", "dataset", "source_file", "source_row"]).append_column("status", rejects["code"])


# --- in memory model ------------------------------------------------------------


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

    def numerics(self, compute: ComputeSpec) -> Numerics:
        """The model's own dtype and device, and the path that proves right on it."""
        from dpo_score.logprobs.self_check import check_model

        own = {"device": str(self.model.device), "dtype": str(self.model.dtype).removeprefix("torch.")}
        size = sum(parameter.numel() for parameter in self.model.parameters())
        asked = resolve_numerics(compute.model_copy(update=own), self.model.config.to_dict(), size)
        with self.as_found():
            return check_model(self.model, replace(asked, compile=False)).numerics

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
    """Values of one held model."""

    def __init__(self, loaded: InMemoryModel, numerics: Numerics, stats: Sequence[str] = ()) -> None:
        self._loaded, self._numerics, self._stats = loaded, numerics, tuple(stats)

    def block(self, name: str, sequences: Sequence[TokenSequence], sample: int = 0) -> BlockLogprobs:
        from dpo_score.logprobs.scorer import PairScorer

        self._refuse_unknown_ids(sequences)
        with self._loaded.as_found():
            results = PairScorer(self._loaded.model, self._numerics, self._stats).score(sequences)
        redone = frozenset(i for i, r in enumerate(results) if isinstance(r, SequenceLogps) and r.redone_dtype)
        return BlockLogprobs([_entry(result) for result in results], redone)

    def _refuse_unknown_ids(self, sequences: Sequence[TokenSequence]) -> None:
        rows = int(self._loaded.model.get_input_embeddings().weight.shape[0])
        largest = max((int(ids.max()) for s in sequences for ids in (s.prompt, s.response) if len(ids)), default=0)
        if largest >= rows:
            raise ModelError(
                f"{type(self._loaded.model).__name__}: token id {largest} lies beyond its {rows} embedding rows; it "
                "was made for another tokenizer: name its own with tokenizer=…"
            )


def _entry(result: SequenceLogps | Unscored) -> CacheEntry | Unscored:
    return CacheEntry(result.token_logps, dict(result.stats)) if isinstance(result, SequenceLogps) else result
