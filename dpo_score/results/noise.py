"""The noise floor of a run: how far its numbers are from fp32 on the plain path, kept with the first block.

A few pairs of the first block are scored again when a model is loaded for it; the result is in that block's
commit record, so a resumed run reports what an uninterrupted one does. Values that came from the cache carry what
was measured when they were computed. Margins: the noise of policy and reference together, on the same pairs, which
are known by the keys of their sequences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_score.data.types import TokenSequence
from dpo_score.errors import DamageError
from dpo_score.models.numerics import Numerics
from dpo_score.storage.base import Store
from dpo_score.storage.fingerprint import digest
from dpo_score.tokenization.pictures import PictureInputs

PAIRS, TOKENS = 8, 2048
NO_PAIR = "no pair of the sample could be scored on both sides"
Noise = Mapping[str, Any]
NOT_MEASURED: Noise = {
    "sequences": 0,
    "reason": "the values came from the cache, which holds no measurement of their noise",
}
CHECKSUM = "checksum"


def sample_size(text: pa.Table) -> int:
    """How many leading pairs are scored twice: at most PAIRS, and TOKENS tokens (at least one pair)."""
    columns = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
    lengths = np.sum([text[name].slice(0, PAIRS).to_numpy() for name in columns], axis=0)
    return max(int(np.count_nonzero(np.cumsum(lengths) <= TOKENS)), min(int(text.num_rows), 1))


def measure(
    model: Any,
    numerics: Numerics,
    sequences: Sequence[TokenSequence],
    entries: Sequence[Any],
    pictures: PictureInputs | None = None,
) -> Noise:
    """JSON values of a `NoiseFloor` over chosen, rejected, chosen, rejected …

    `deltas` and `keys` are those of the pairs that were measured on both sides, in that order.
    """
    from dpo_score.logprobs.noise_floor import noise_floor

    found = asdict(noise_floor(model, numerics, sequences, entries, pictures=pictures))
    deltas = dict(zip(found.pop("measured"), found["deltas"], strict=True))
    whole = [i for i in deltas if i ^ 1 in deltas]
    return {**found, "deltas": [deltas[i] for i in whole], "keys": [sequences[i].key.hex() for i in whole]}


def remembered(store: Store, namespace: str) -> Noise:
    """What was measured when the cached values were computed; nothing where the file is damaged."""
    name = f"noise/{namespace}.json"
    try:
        if store.exists(name):
            return _unsealed(store.read_json(name))
    except DamageError:
        pass
    return NOT_MEASURED


def remember(store: Store, namespace: str, found: Noise) -> None:
    """Keep a measurement with a checksum: nothing but it would show a flipped bit."""
    store.write_json(f"noise/{namespace}.json", {**found, CHECKSUM: digest(dict(found))})


def _unsealed(found: Any) -> Noise:
    if not isinstance(found, dict):
        return NOT_MEASURED
    kept = {name: value for name, value in found.items() if name != CHECKSUM}
    return kept if found.get(CHECKSUM) == digest(kept) else NOT_MEASURED


def as_snapshot(store: Store, namespace: str) -> list[str]:
    """The namespace and what is remembered of it, as a manifest keeps it when a run begins, so that a resumed run
    reports the same whatever other runs measure meanwhile."""
    return [namespace, json.dumps(dict(remembered(store, namespace)), sort_keys=True)]


def from_snapshot(kept: Sequence[str], store: Store, namespace: str) -> Noise:
    """What was remembered of `namespace` when the run began; as it is now where the manifest kept none of it."""
    if len(kept) == 2 and kept[0] == namespace:
        return dict(json.loads(kept[1]))
    return remembered(store, namespace)


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


def _margin_noise(policy: Noise | None, reference: Noise | None) -> NDArray[np.float64] | str:
    """|(δπ_c − δπ_r) − (δρ_c − δρ_r)| per pair that was measured with both models, or why there is none."""
    for found in (policy, reference):
        if found is not None and found.get("reason"):
            return str(found["reason"])
    if policy is None:
        return "not measured"
    own, other = _by_pair(policy), None if reference is None else _by_pair(reference)
    shared = own if other is None else own.keys() & other.keys()
    if not own or not shared:
        return "reference and policy were sampled on different pairs" if own else NO_PAIR
    return np.abs([own[pair] - (other[pair] if other else 0.0) for pair in own if pair in shared])


def _by_pair(found: Noise) -> dict[tuple[str, str], float]:
    """δ_c − δ_r by the keys of the two sequences. What an earlier release measured has places instead, of which an odd
    number says nothing."""
    deltas = found.get("deltas") or ()
    keys = found.get("keys")
    if keys is None:
        keys = [f"{place} of {len(deltas)}" for place in range(len(deltas) if len(deltas) % 2 == 0 else 0)]
    return {(keys[i], keys[i + 1]): deltas[i] - deltas[i + 1] for i in range(0, len(keys), 2)}


def _public(found: Noise | None) -> dict[str, Any] | None:
    return None if found is None else {key: value for key, value in found.items() if key not in ("deltas", "keys")}
