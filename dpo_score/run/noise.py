"""The noise floor of a run: how far its numbers are from fp32 on the plain path, kept with the first block.

A few pairs of the first block are scored again when a model is loaded for it; the result stands in that block's
commit record, so a resumed run reports what an uninterrupted one does. Values that came from the cache carry what
was measured when they were computed. Margins: the noise of policy and reference together, on the same pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_score.errors import DamageError
from dpo_score.logps.numerics import Numerics
from dpo_score.logps.results import SequenceLogps
from dpo_score.pairs.records import TokenSequence
from dpo_score.store.cache import CacheEntry
from dpo_score.store.storage import Store

PAIRS, TOKENS = 8, 2048
Noise = Mapping[str, Any]


def sample_size(text: pa.Table) -> int:
    """How many leading pairs are scored twice: at most PAIRS, and TOKENS tokens (at least one pair)."""
    columns = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
    lengths = np.sum([text[name].slice(0, PAIRS).to_numpy() for name in columns], axis=0)
    return max(int(np.count_nonzero(np.cumsum(lengths) <= TOKENS)), min(int(text.num_rows), 1))


def measure(model: Any, numerics: Numerics, sequences: Sequence[TokenSequence], entries: Sequence[Any]) -> Noise:
    """JSON values of a `NoiseFloor`; its `deltas` are in the order of the sequences."""
    from dpo_score.logps.noise import noise_floor

    scored = [SequenceLogps(e.token_logps) if isinstance(e, CacheEntry) else e for e in entries]
    found = asdict(noise_floor(model, numerics, sequences, scored))
    return {**found, "deltas": list(found["deltas"])}


def remembered(store: Store, namespace: str) -> Noise:
    """What was measured when the cached values were computed."""
    name = f"noise/{namespace}.json"
    try:
        if store.exists(name):
            found = store.read_json(name)
            return dict(found)
    except (DamageError, TypeError, ValueError):
        pass
    return {"sequences": 0, "reason": "the values came from the cache, which holds no measurement of their noise"}


def remember(store: Store, namespace: str, found: Noise) -> None:
    store.write_json(f"noise/{namespace}.json", found)


def of_policy(policy: Noise | None, reference: Noise | None, margins: NDArray[np.float64]) -> dict[str, Any]:
    """The summary's entry: both models' noise, that of the margin (nats), and the share of margins below its mean."""
    found: dict[str, Any] = {"policy": _public(policy), "reference": _public(reference)}
    combined = _margin_noise(policy, reference)
    if isinstance(combined, str):
        return {**found, "margin_mean": None, "margin_max": None, "share_below": None, "reason": combined}
    mean = float(np.mean(combined))
    sizes = np.abs(margins)
    share = float(np.mean(sizes < mean)) if len(sizes) else None
    return {**found, "margin_mean": mean, "margin_max": float(np.max(combined)), "share_below": share}


def _margin_noise(policy: Noise | None, reference: Noise | None) -> Any:
    """|(δπ_c − δπ_r) − (δρ_c − δρ_r)| per sampled pair, or why it cannot be had."""
    if policy is None or policy.get("reason") or not policy.get("deltas"):
        return (policy or {}).get("reason") or "not measured"
    own = np.asarray(policy["deltas"], np.float64)
    other = np.zeros_like(own)
    if reference is not None:
        if reference.get("reason") or len(reference.get("deltas", ())) != len(own):
            return reference.get("reason") or "reference and policy were sampled on different pairs"
        other = np.asarray(reference["deltas"], np.float64)
    if len(own) % 2:
        return "a sequence of the sample could not be scored"
    difference = own - other
    return np.abs(difference[0::2] - difference[1::2])


def _public(found: Noise | None) -> dict[str, Any] | None:
    return None if found is None else {key: value for key, value in found.items() if key != "deltas"}
