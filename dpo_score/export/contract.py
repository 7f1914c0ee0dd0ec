"""DIR/dpo_score.json: what reference values belong to, for a trainer to hold against its own settings.

The reader of this file is `load_ref_logps.py`, which is written beside it and needs no part of this package;
`tokenizer_digest` and `fingerprint` are written there once more, and tests hold the two to one answer. `noise_floor` in
the file is what a trainer that compares should tolerate; the noise floor that a run measures is another number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dpo_score.engine.plan import RunPlan
from dpo_score.export.layout import Export
from dpo_score.models.resolve import ModelSource

VERSION = 1
FLOAT32_TOLERANCE = 1e-3
"""Nats by which two correct float32 programs may differ on the sum of one answer."""
HEADROOM = 4.0
"""The largest error of all rows over the largest of the few that were measured."""
SAMPLED_WEIGHTS, SAMPLED_VALUES = 128, 8
DTYPES = ("float32", "float16", "bfloat16")


def contract(plan: RunPlan, export: Export, rows: Mapping[str, Any], noise: Mapping[str, Any]) -> dict[str, Any]:
    """The contract as JSON values. `rows`: counts by outcome and split; `noise`: what stage one measured of its own."""
    reference = plan.references[0]
    source, numerics = reference.source, reference.numerics
    assert source is not None
    assert numerics is not None
    return {
        "version": VERSION,
        "made_for": export.consumer.name,
        "columns": dict(export.renames),
        "reference": {
            "name": _public_name(source.name),
            "weights": source.digest,
            "has_adapter": source.adapter is not None,
            "fingerprint": fingerprint(source),
        },
        "dtype": numerics.dtype,
        "numerics": numerics.to_json(),
        "noise_floor": tolerance(numerics.dtype, noise.get("logp_max")),
        "text": _text(plan),
        "ld_alpha": export.ld_alpha,
        "rows": dict(rows),
    }


def tolerance(dtype: str, measured: float | None) -> float | None:
    """Nats that these values may be off a float32 trainer's, on one answer; None where 16 bits were not measured."""
    if measured is None:
        return FLOAT32_TOLERANCE if dtype == "float32" else None
    return FLOAT32_TOLERANCE + HEADROOM * measured


def _public_name(name: str) -> str:
    """A model's name without the folders of this machine."""
    return Path(name).name if Path(name).exists() else name


def _text(plan: RunPlan) -> dict[str, Any]:
    """How rows became token ids. `max_length` is what was asked for, `limit` what was in force."""
    identity, text, tokenizer = plan.renderer.identity(), plan.config.text, plan.tokenizer
    return {
        "max_length": text.max_length,
        "limit": identity["max_length"],
        "truncation": text.truncation,
        "prompt_split": text.prompt_split,
        "score": text.score,
        "render": text.render,
        "chat": text.render == "chat" or any(dataset.is_conversational for dataset in plan.datasets),
        "template_sha256": identity["template_sha256"],
        "template_date": identity["date"],
        "tokenizer": tokenizer_digest(tokenizer, [tokenizer.pad_token]) if tokenizer is not None else None,
        "pad_token": getattr(tokenizer, "pad_token", None),
    }


def tokenizer_digest(tokenizer: Any, without: Sequence[str | None] = ()) -> str:
    """SHA-256 (hex) of what decides text → ids; special tokens in `without` do not (padding decides nothing)."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    ends = (tokenizer.bos_token, tokenizer.eos_token)
    absent = {name for name in without if name not in ends}
    added = [token for token in rules.get("added_tokens") or [] if token["content"] not in absent]
    parts = ("normalizer", "pre_tokenizer", "post_processor", "model")
    flags = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    text = json.dumps([[rules.get(p) for p in parts], added, ends, flags], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def fingerprint(source: ModelSource) -> dict[str, dict[str, str]] | None:
    """Parameter → digest of a sample of its values, by the dtype they are rounded to. At most SAMPLED_WEIGHTS of them.

    A trainer that starts from these weights, in whichever of the dtypes, finds the same digests. None where files do
    not hold the weights under the names of a model's parameters (pickles, an adapter).
    """
    if source.adapter is not None or source.pickle:
        return None
    names = sorted((name, path) for path in source.weights for name in _names(path))
    step = max(1, -(-len(names) // SAMPLED_WEIGHTS))
    found = {}
    for name, path in names[::step]:
        with safe_open(path, framework="pt") as file:
            found[name] = _digests(file.get_slice(name))
    return found


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _digests(tensor: Any) -> dict[str, str]:
    """Of 8 evenly spaced values of each of the first, middle and last rows, as float32 after rounding."""
    import torch

    def spaced(values: Any) -> Any:
        flat = values.reshape(-1)
        return flat[torch.linspace(0, flat.numel() - 1, min(SAMPLED_VALUES, flat.numel())).long()]

    shape = tensor.get_shape()
    rows = sorted({0, shape[0] // 2, shape[0] - 1}) if len(shape) > 1 else []
    parts = [spaced(tensor[row : row + 1]) for row in rows] or [spaced(tensor[:] if shape else tensor[...])]
    found = {}
    for dtype in DTYPES:
        rounded = [part.to(getattr(torch, dtype)).float().numpy().astype("<f4").tobytes() for part in parts]
        found[dtype] = hashlib.blake2b(b"".join(rounded), digest_size=8).hexdigest()
    return found
