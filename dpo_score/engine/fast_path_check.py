"""Whether the fast path may be trusted on a model: found out once, kept in the cache, asked again at every load.

Numerics must be known before the first block, and a run whose values are all cached must not read weights; so
the verdict of a model under given numerics and library versions is remembered.
"""

from __future__ import annotations

import math

from dpo_score.engine.context import RunContext
from dpo_score.engine.environment import versions
from dpo_score.engine.model_logprobs import plain
from dpo_score.errors import DamageError
from dpo_score.logprobs.numerics import Numerics
from dpo_score.models.resolve import ModelSource
from dpo_score.storage.fingerprint import digest
from dpo_score.storage.io import open_store


def trusted(context: RunContext, source: ModelSource, numerics: Numerics) -> Numerics:
    """`numerics` as they are where the fast path reproduces the plain one, else with the plain path, said aloud."""
    if numerics.path != "fast":
        return numerics
    reason = _remembered(context, source, numerics)
    if reason is None:
        reason = _find_out(context, source, numerics)
    if not reason:
        return numerics
    context.progress.warn(f"{source.name}: scored on the plain path, which is slower: {reason}")
    return plain(numerics)


def _name(source: ModelSource, numerics: Numerics) -> str:
    asked = {"weights": source.base_digest, "numerics": numerics.to_json(), "versions": versions(numerics)}
    return f"verdicts/{digest(asked)}.json"


def _remembered(context: RunContext, source: ModelSource, numerics: Numerics) -> str | None:
    store, name = open_store(context.cache_dir), _name(source, numerics)
    if not store.exists(name):
        return None
    try:
        return str(store.read_json(name)["refused"])
    except (DamageError, KeyError, TypeError):
        return None


def _find_out(context: RunContext, source: ModelSource, numerics: Numerics) -> str:
    from dpo_score.logprobs.self_check import verify_fast_path

    context.progress.say(f"loading {source.name} ({numerics.dtype} on {numerics.device}) to check the fast path")
    verdict = verify_fast_path(context.shelf.load(source, numerics).model, numerics)
    reason = "" if verdict.ok else verdict.reason
    delta = verdict.max_delta if verdict.max_delta is not None and math.isfinite(verdict.max_delta) else None
    open_store(context.cache_dir).write_json(_name(source, numerics), {"refused": reason, "delta": delta})
    return reason
