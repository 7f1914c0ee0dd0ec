"""What a model can take, read off its configuration and the shapes of its weights: sequence length and token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_score.errors import ModelError
from dpo_score.models import adapter_files
from dpo_score.models import weights as files
from dpo_score.models.resolve import ModelSource
from dpo_score.tokenization.truncation import SideLimits

RELATIVE_POSITIONS = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "bloom"})


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the language model (itself for text-only models)."""
    for name in ("text_config", "llm_config", "language_config", "decoder"):
        if isinstance(config.get(name), Mapping):
            return dict(config[name])
    return config


def context_limit(config: Mapping[str, Any]) -> int | None:
    """The longest sequence (tokens) that a model's positions allow, or None where none is stated or none exists."""
    config = config.get("text_config") or config
    if config.get("model_type") in RELATIVE_POSITIONS:
        return None
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"):
        if isinstance(config.get(name), int) and config[name] > 0:
            return int(config[name])
    return None


def side_limits(config: Mapping[str, Any]) -> SideLimits:
    """The longest prompt that an encoder's positions allow, and the longest answer that its decoder's do."""
    found = {}
    for side in ("encoder", "decoder"):
        own = config.get(f"max_{side}_position_embeddings")
        inner = config.get(side)
        found[side] = own or context_limit(inner if isinstance(inner, Mapping) else config)
    return SideLimits(found["encoder"], found["decoder"])


def text_limits(config: Mapping[str, Any]) -> int | SideLimits | None:
    """What a renderer has to keep to for a model with this configuration: one limit, or one for each side."""
    return side_limits(config) if config.get("is_encoder_decoder") else context_limit(config)


def embedding_rows(source: ModelSource) -> int:
    """How many token ids the model has rows for: by the weights' own shape, else the configuration's vocab_size."""
    rows = adapter_files.embedding_rows(source.adapter_files) or files.embedding_rows(source.weights)
    if rows is not None:
        return rows
    config = source.config.get("text_config") or source.config
    if not isinstance(config.get("vocab_size"), int):
        raise ModelError(f"{source.name}: neither its weights nor its config.json say how many token ids it knows")
    return int(config["vocab_size"])
