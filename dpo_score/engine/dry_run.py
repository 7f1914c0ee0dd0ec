"""What a run would do, without doing it: `--dry-run` from a sample of rows, `--probe` from a few packs.

Promises: under a minute by sampling at most SAMPLE rows; nothing is written under OUT. Estimates are labelled so.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_score.config.schema import RunConfig
from dpo_score.data.dataset import read_rows_at
from dpo_score.data.types import EncodedPair, Pair, Rejected, TokenSequence
from dpo_score.engine.context import RunContext, run_context
from dpo_score.engine.model_logprobs import CachedLogprobs, cache_fields, with_slower_way
from dpo_score.engine.plan import RunPlan, text_notice
from dpo_score.engine.prepare import parameters, resolve_plan
from dpo_score.engine.progress import Progress
from dpo_score.errors import ConfigError, DataError
from dpo_score.logprobs.numerics import SPEED
from dpo_score.models.memory import clone_bytes, peak_bytes
from dpo_score.models.numerics import Numerics
from dpo_score.models.resolve import ModelSource
from dpo_score.results.schemas import STATS

if TYPE_CHECKING:
    from dpo_score.logprobs.scorer import PairScorer

SAMPLE, SAMPLE_RUN = 1000, 20
"""Rows in all, and how many of them lie one after the other: each other place to read from costs a seek."""
PROBE_PACKS = 3


def dry_run(config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Format and polarity, rows, lengths, tokens with and without sharing, memory, time, cache hits, identities."""
    with _scratch(config, progress) as context:
        plan = resolve_plan(config, context)
        sample, rows = _sampled(plan)
        encoded = [item for item in sample if isinstance(item, EncodedPair)]
        work = _model_work(context, plan, encoded)
        found: dict[str, Any] = {"data": [dataset.summary() for dataset in plan.datasets]}
        found["rows"] = f"{plan.rows.wanted:,} in {len(list(plan.rows))} blocks of {plan.rows.block_rows:,}"
        found["sampled"] = f"{rows:,} rows; {_rejects(sample)}"
        if plan.unloadable:
            found["not scored"] = [f"{name}: {failure.reason}" for name, failure in plan.unloadable.items()]
        found |= _lengths(encoded, plan.rows.wanted / max(rows, 1))
        found |= _cost(plan, work, encoded, rows)
        found["cache"] = [item.line for item in work]
        found["identities"] = [f"text {plan.identities.text_digest}", f"reference {plan.identities.reference_digest}"]
        found["text"] = text_notice(plan)
        return found


def probe(config: RunConfig, progress: Progress, price_per_hour: float | None) -> dict[str, Any]:
    """Score a few packs with every kind of model that has anything to compute: rows/s, hours in all, and money."""
    with _scratch(config, progress) as context:
        plan = resolve_plan(config, context)
        if not plan.models:
            raise ConfigError("nothing to probe: no reference and no policy is a model")
        sample, rows = _sampled(plan)
        encoded = [item for item in sample if isinstance(item, EncodedPair)]
        if not encoded:
            raise DataError(f"nothing to probe: no pair of {rows:,} sampled rows can be scored; {_rejects(sample)}")
        work = _model_work(context, plan, encoded)
        speeds = _speeds(context, plan, [item for item in work if item.tokens], encoded)
        return _forecast(work, speeds, plan.rows.wanted, rows, price_per_hour)


@contextmanager
def _scratch(config: RunConfig, progress: Progress) -> Iterator[RunContext]:
    """A context in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="dpo-score-") as folder, run_context(config, progress, folder) as context:
        yield context


def _sampled(plan: RunPlan) -> tuple[list[EncodedPair | Rejected], int]:
    """Short runs of rows, spread evenly over what would be scored, rendered and tokenised."""
    wanted, together = plan.rows.wanted, np.arange(SAMPLE_RUN)
    starts = np.linspace(0, max(wanted - SAMPLE_RUN, 0), SAMPLE // SAMPLE_RUN).astype(int)
    every = np.arange(wanted) if wanted <= SAMPLE else np.unique(starts[:, None] + together)
    rows = every.tolist() if plan.rows.sample is None else [plan.rows.sample[place] for place in every]
    read = read_rows_at(plan.datasets, rows)
    rejected = [item for item in read if isinstance(item, Rejected)]
    return [*plan.renderer.encode([item for item in read if isinstance(item, Pair)]), *rejected], len(rows)


def _rejects(sample: Sequence[EncodedPair | Rejected]) -> str:
    codes = [item.code for item in sample if isinstance(item, Rejected)]
    if not codes:
        return "none would be rejected"
    return "would be rejected: " + ", ".join(f"{codes.count(code)} {code}" for code in sorted(set(codes)))


def _lengths(encoded: Sequence[EncodedPair], scale: float) -> dict[str, Any]:
    """Token counts, and what sharing the prompt saves: prompt + both answers against two whole sequences."""
    if not encoded:
        return {"tokens": "no pair of the sample can be scored"}
    truncated = sum(e.tokens.chosen_truncated or e.tokens.rejected_truncated for e in encoded)
    parts = np.array([[len(e.tokens.prompt), len(e.tokens.chosen), len(e.tokens.rejected)] for e in encoded])
    shared, apart = int(parts.sum()), int((parts.sum(axis=1) + parts[:, 0]).sum())
    return {
        "lengths": histogram(parts.sum(axis=1)),
        "tokens": f"about {shared * scale:,.0f} with the prompt computed once, {apart * scale:,.0f} without (estimate)",
        "truncated": f"{truncated:,} pairs of the sample",
    }


def histogram(lengths: Any, bins: int = 8) -> list[str]:
    """Lines of `from-to count bar`, over doubling bins of tokens per pair."""
    edges = 2 ** np.arange(int(np.log2(max(lengths.min(), 1))), int(np.log2(max(lengths.max(), 1))) + 2)
    counts, edges = np.histogram(lengths, bins=edges[-bins - 1 :])
    top = max(int(counts.max()), 1)
    bars = ("█" * max(round(20 * count / top), 1 if count else 0) for count in counts)
    spans = (f"{low:>6}-{high - 1:<6}" for low, high in itertools.pairwise(edges))
    return [f"{span} {count:>6} {bar}" for span, count, bar in zip(spans, counts, bars, strict=True)]


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What a run computes with one model. `tokens`: unique ones of the sample that the cache lacks; `line` says it."""

    label: str
    source: ModelSource
    numerics: Numerics
    tokens: int
    line: str

    @property
    def kind(self) -> tuple[Any, ...]:
        """Models of one kind take equally long. An adapter that is not merged costs products of its own."""
        beside = self.source.adapter is not None and self.numerics.dtype != "float32"
        return self.source.config.get("model_type"), parameters(self.source), beside, self.numerics


def _model_work(context: RunContext, plan: RunPlan, encoded: Sequence[EncodedPair]) -> list[ModelWork]:
    """As a run decides: the cache first, and nothing for a policy that equals its reference."""
    sequences = {sequence.key: sequence for sequence in _sequences(encoded)}
    models = [(r.label, r.source, r.numerics, False) for r in plan.references]
    models += [(p.name, p.source, p.numerics, p.equals_reference) for p in plan.policies]
    there = ((label, s, n, same) for label, s, n, same in models if s is not None and n is not None)
    return [
        ModelWork(label, source, numerics, 0, f"{label}: equals its reference, whose values it takes over")
        if same
        else _looked_up(context, plan, (label, source, numerics), sequences)
        for label, source, numerics, same in there
    ]


def _looked_up(
    context: RunContext,
    plan: RunPlan,
    model: tuple[str, ModelSource, Numerics],
    sequences: Mapping[bytes, TokenSequence],
) -> ModelWork:
    from dpo_score.logprobs.scorer import token_costs

    label, source, numerics = model
    space = context.cache.namespace(cache_fields(source, numerics))
    hits = space.view(space.snapshot()).lookup(list(sequences), wanted=[STATS[name] for name in plan.stats])
    tokens = sum(token_costs([sequence for key, sequence in sequences.items() if key not in hits]))
    line = f"{label}: {len(hits):,} of {len(sequences):,} sampled sequences are known"
    return ModelWork(label, source, numerics, tokens, line)


def _cost(plan: RunPlan, work: Sequence[ModelWork], encoded: Sequence[EncodedPair], rows: int) -> dict[str, str]:
    if not work:
        return {"models": "none is needed"}
    numerics, scale = work[0].numerics, plan.rows.wanted / max(rows, 1)
    seconds = sum(2.0 * parameters(d.source) * d.tokens * scale / SPEED[d.numerics.device_kind] for d in work)
    longest = max(
        (len(e.tokens.prompt) + max(len(e.tokens.chosen), len(e.tokens.rejected)) for e in encoded), default=0
    )
    pack = f"{numerics.batch_tokens:,} tokens a pack"
    return {
        "numerics": f"{numerics.dtype} on {numerics.device}, {numerics.path} path, {pack}",
        "memory": _memory(work, longest),
        "time": f"about {seconds:,.0f} s for what is to be computed (estimate; --probe measures)",
    }


def _memory(work: Sequence[ModelWork], longest: int) -> str:
    """The bound of the largest model. What adapters are merged into is cloned in host memory, on a CPU the same."""
    clones = [_clones(item, work) for item in work]
    here = work[0].numerics.device_kind == "cpu"
    peaks = [peak_bytes(d.source.config, d.numerics, parameters(d.source), longest) for d in work]
    bound = max(peak + (clone if here else 0) for peak, clone in zip(peaks, clones, strict=True))
    said = f"at most {_gib(bound)} GiB beside the program itself: weights, one pack, scratch"
    if not any(clones):
        return said
    what = "clones of what adapters change"
    return f"{said}, {what}" if here else f"{said}; {_gib(max(clones))} GiB on the host: {what}"


def _gib(size: int) -> str:
    """Bytes in GiB. A configuration may state sizes that no floating-point number holds."""
    return f"{size / 2**30:.2f}" if size < 2**80 else "more than 2⁵⁰"


def _clones(item: ModelWork, work: Sequence[ModelWork]) -> int:
    """Bytes of a model's weights that all adapters over the same base have cloned in the end."""
    same = [d for d in work if d.source.base_digest == item.source.base_digest and d.numerics == item.numerics]
    files = [path for d in same for path in d.source.adapter_files]
    merged = item.numerics.dtype == "float32" and "quantization_config" not in item.source.config
    return clone_bytes(item.source.weights, files, parameters(item.source)) if files and merged else 0


def _sequences(encoded: Sequence[EncodedPair]) -> list[TokenSequence]:
    return [pair.sequence(side) for pair in encoded for side in ("chosen", "rejected")]


def _prefix(encoded: Sequence[EncodedPair], budget: int) -> Sequence[EncodedPair]:
    """The first pairs whose unique tokens fill `budget`."""
    total = 0
    for count, pair in enumerate(encoded, 1):
        total += len(pair.tokens.prompt) + len(pair.tokens.chosen) + len(pair.tokens.rejected)
        if total >= budget:
            return encoded[:count]
    return encoded


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class Speed:
    """Pairs and unique tokens a second, measured with one model."""

    label: str
    pairs: float
    tokens: float


def _speeds(
    context: RunContext, plan: RunPlan, work: Sequence[ModelWork], encoded: Sequence[EncodedPair]
) -> dict[Any, Speed]:
    """By kind of model, measured with the first of each."""
    first: dict[Any, ModelWork] = {}
    for item in work:
        first.setdefault(item.kind, item)
    return {kind: _speed(item, _scorer(context, plan, item), encoded) for kind, item in first.items()}


def _scorer(context: RunContext, plan: RunPlan, item: ModelWork) -> PairScorer:
    stats = [STATS[name] for name in plan.stats]
    return with_slower_way(
        context.progress,
        item.label,
        item.numerics,
        lambda numerics: CachedLogprobs(
            context, item.source, numerics, stats, snapshot=(), pictures=plan.pictures
        ).scorer(),
    )


def _speed(item: ModelWork, scorer: PairScorer, encoded: Sequence[EncodedPair]) -> Speed:
    from dpo_score.logprobs.scorer import token_costs

    few = _prefix(encoded, item.numerics.batch_tokens * PROBE_PACKS)
    scorer.score(_sequences(few[: max(len(few) // PROBE_PACKS, 1)]))  # warm-up: kernels, allocator
    seconds = _timed(lambda: scorer.score(_sequences(few)))
    return Speed(item.label, len(few) / seconds, sum(token_costs(_sequences(few))) / seconds)


def _forecast(
    work: Sequence[ModelWork], speeds: Mapping[Any, Speed], rows: int, sampled: int, price_per_hour: float | None
) -> dict[str, Any]:

    def measured(speed: Speed, kind: Any) -> str:
        others = [d.label for d in work if d.tokens and d.kind == kind and d.label != speed.label]
        alike = f"; taken to be the same: {', '.join(others)}" if others else ""
        return f"{speed.pairs:,.1f} with {speed.label}{alike}"

    hours = sum(d.tokens * rows / sampled / speeds[d.kind].tokens for d in work if d.tokens) / 3600.0
    found: dict[str, Any] = {
        "cache": [item.line for item in work],
        "rows/s": [measured(speed, kind) for kind, speed in speeds.items()] or "nothing is left to compute",
        "hours": f"{hours:,.3f} for {rows:,} rows, without loading and reading",
    }
    if price_per_hour is not None:
        found["cost"] = f"{hours * price_per_hour:,.2f} at {price_per_hour:g} an hour"
    return found
