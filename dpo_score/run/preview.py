"""What a run would do, without doing it: `--dry-run` from a sample of rows, `--probe` from a few packs.

Promises: under a minute by sampling at most SAMPLE rows; nothing is written under OUT. Estimates are labelled so.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_score.config import RunConfig
from dpo_score.errors import ConfigError
from dpo_score.logps.memory import peak_bytes
from dpo_score.pairs.dataset import read_rows_at
from dpo_score.pairs.records import EncodedPair, Pair, Rejected
from dpo_score.run.desk import Desk
from dpo_score.run.job import SPEED, Job, text_notice
from dpo_score.run.local import at_desk
from dpo_score.run.prepare import Preparation, parameters
from dpo_score.run.progress import Progress
from dpo_score.run.values import ModelValues, cache_fields

SAMPLE = 1000
PROBE_PACKS = 3


def dry_run(config: RunConfig, progress: Progress) -> dict[str, Any]:
    """Format and polarity, rows, lengths, tokens with and without sharing, memory, time, cache hits, identities."""
    with _scratch(config, progress) as desk:
        job = Preparation(config, desk).job()
        sample, rows = _sampled(job)
        encoded = [item for item in sample if isinstance(item, EncodedPair)]
        found: dict[str, Any] = {"data": [dataset.summary() for dataset in job.datasets]}
        found["rows"] = f"{job.rows.wanted:,} in {len(list(job.rows))} blocks of {job.rows.block_rows:,}"
        found["sampled"] = f"{rows:,} rows; {_rejects(sample)}"
        found |= _lengths(encoded, job.rows.wanted / max(rows, 1))
        found |= _cost(job, encoded, rows)
        found["cache"] = _hits(desk, job, encoded)
        found["identities"] = [f"text {job.identities.text_digest}", f"reference {job.identities.reference_digest}"]
        found["text"] = text_notice(job)
        return found


def probe(config: RunConfig, progress: Progress, price_per_hour: float | None) -> dict[str, Any]:
    """Score a few packs with the reference (or first policy): rows/s, hours for all models, and money."""
    with _scratch(config, progress) as desk:
        job = Preparation(config, desk).job()
        if not job.models:
            raise ConfigError("nothing to probe: no reference and no policy is a model")
        _, source, numerics = job.models[0]
        sample, _ = _sampled(job)
        encoded = [item for item in sample if isinstance(item, EncodedPair)]
        scorer = ModelValues(desk, source, numerics, snapshot=()).scorer()
        budget = numerics.batch_tokens * PROBE_PACKS
        few = _prefix(encoded, budget)
        scorer.score(_sequences(few[: max(len(few) // PROBE_PACKS, 1)]))  # warm-up: kernels, allocator
        seconds = _timed(lambda: scorer.score(_sequences(few)))
        return _forecast(job, len(few), seconds, price_per_hour)


def _scratch(config: RunConfig, progress: Progress) -> Any:
    return at_desk(config, progress, tempfile.mkdtemp(prefix="dpo-score-"))


def _sampled(job: Job) -> tuple[list[EncodedPair | Rejected], int]:
    """Rows spread evenly over what would be scored, rendered and tokenised."""
    count = min(SAMPLE, job.rows.wanted)
    places = np.unique(np.linspace(0, job.rows.wanted - 1, count).astype(int)).tolist()
    rows = places if job.rows.sample is None else [job.rows.sample[place] for place in places]
    read = read_rows_at(job.datasets, rows)
    rejected = [item for item in read if isinstance(item, Rejected)]
    return [*job.renderer.encode([item for item in read if isinstance(item, Pair)]), *rejected], len(places)


def _rejects(sample: Sequence[EncodedPair | Rejected]) -> str:
    codes = [item.code for item in sample if isinstance(item, Rejected)]
    if not codes:
        return "none would be rejected"
    return "would be rejected: " + ", ".join(f"{codes.count(code)} {code}" for code in sorted(set(codes)))


def _lengths(encoded: Sequence[EncodedPair], scale: float) -> dict[str, Any]:
    """Token counts, and what sharing the prompt saves: prompt + both answers against two whole sequences."""
    if not encoded:
        return {"tokens": "no pair of the sample can be scored"}
    parts = np.array([[len(e.prompt_ids), len(e.chosen_ids), len(e.rejected_ids)] for e in encoded])
    shared, apart = int(parts.sum()), int((parts.sum(axis=1) + parts[:, 0]).sum())
    return {
        "lengths": histogram(parts.sum(axis=1)),
        "tokens": f"about {shared * scale:,.0f} with the prompt computed once, {apart * scale:,.0f} without (estimate)",
        "truncated": f"{sum(e.chosen_truncated or e.rejected_truncated for e in encoded):,} pairs of the sample",
    }


def histogram(lengths: Any, bins: int = 8) -> list[str]:
    """Lines of `from-to count bar`, over doubling bins of tokens per pair."""
    edges = 2 ** np.arange(int(np.log2(max(lengths.min(), 1))), int(np.log2(max(lengths.max(), 1))) + 2)
    counts, edges = np.histogram(lengths, bins=edges[-bins - 1 :])
    top = max(int(counts.max()), 1)
    bars = ("█" * max(round(20 * count / top), 1 if count else 0) for count in counts)
    spans = (f"{low:>6}-{high - 1:<6}" for low, high in itertools.pairwise(edges))
    return [f"{span} {count:>6} {bar}" for span, count, bar in zip(spans, counts, bars, strict=True)]


def _cost(job: Job, encoded: Sequence[EncodedPair], rows: int) -> dict[str, str]:
    if not job.models:
        return {"models": "none is needed"}
    _, source, numerics = job.models[0]
    tokens = sum(len(e.prompt_ids) + len(e.chosen_ids) + len(e.rejected_ids) for e in encoded)
    flops = 2.0 * parameters(source) * tokens * job.rows.wanted / max(rows, 1)
    longest = max((len(e.prompt_ids) + max(len(e.chosen_ids), len(e.rejected_ids)) for e in encoded), default=0)
    bound = peak_bytes(source.config, numerics, parameters(source), longest)
    pack = f"{numerics.batch_tokens:,} tokens a pack"
    return {
        "numerics": f"{numerics.dtype} on {numerics.device}, {numerics.path} path, {pack}",
        "memory": f"at most {bound / 2**30:.2f} GiB beside the program itself: weights, one pack, scratch",
        "time": f"about {flops / SPEED[numerics.device_kind]:,.0f} s a model (estimate; --probe measures)",
    }


def _hits(desk: Desk, job: Job, encoded: Sequence[EncodedPair]) -> list[str]:
    keys = list(dict.fromkeys(sequence.key for sequence in _sequences(encoded)))
    lines = []
    for label, source, numerics in job.models:
        space = desk.cache.namespace(cache_fields(source, numerics))
        hits = len(space.view(space.snapshot()).lookup(keys))
        lines.append(f"{label}: {hits:,} of {len(keys):,} sampled sequences are known")
    return lines


def _sequences(encoded: Sequence[EncodedPair]) -> list[Any]:
    return [pair.sequence(side) for pair in encoded for side in ("chosen", "rejected")]


def _prefix(encoded: Sequence[EncodedPair], budget: int) -> Sequence[EncodedPair]:
    """The first pairs whose unique tokens fill `budget`."""
    total = 0
    for count, pair in enumerate(encoded, 1):
        total += len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
        if total >= budget:
            return encoded[:count]
    return encoded


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _forecast(job: Job, pairs: int, seconds: float, price_per_hour: float | None) -> dict[str, Any]:
    models = len(job.models)
    hours = job.rows.wanted / pairs * seconds * models / 3600.0
    found = {
        "rows/s": f"{pairs / seconds:,.1f}",
        "hours": f"{hours:,.3f} for {job.rows.wanted:,} rows and {models} models, without loading and reading",
    }
    if price_per_hour is not None:
        found["cost"] = f"{hours * price_per_hour:,.2f} at {price_per_hour:g} an hour"
    return found
