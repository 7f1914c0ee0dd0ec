"""What a model can take, read off its configuration and the shapes of its weights: sequence length and token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_score.errors import ModelError
from dpo_score.models import adapter_files
from dpo_score.models import weights as files
from dpo_score.models.resolve import ModelSource
from dpo_score.tokenization.truncation import SideLimits

STRETCHING = frozenset({"linear", "dynamic", "ntk", "yarn"})
"""Scalings of rotary positions whose factor counts on top of `max_position_embeddings`. With llama3 and longrope that
number is what the model was made for already."""
STRETCHED_ALREADY = ("gemma3",)
"""Families with such a scaling on some layers, whose `max_position_embeddings` includes it."""
TABLES = frozenset(
    {"gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "openai-gpt", "opt", "biogpt", "ctrl", "xlm", "bert"}
    | {"roberta", "electra", "xlnet", "imagegpt"}
)
"""Families that look positions up in a table: none beyond it can be computed."""
RELATIVE_POSITIONS = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "bloom"})


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the language model (itself for text-only models)."""
    for name in ("text_config", "llm_config", "language_config", "decoder"):
        if isinstance(config.get(name), Mapping):
            return dict(config[name])
    return config


def context_limit(config: Mapping[str, Any]) -> int | None:
    """The longest sequence (tokens) that a model is made for, or None where none is stated or none exists.

    Model cards that extend a context by YaRN, linear or dynamic scaling leave `max_position_embeddings` as it was and
    add a factor (Qwen2.5's card: 32,768 and 4): the limit is their product.
    """
    config = config.get("text_config") or config
    if config.get("model_type") in RELATIVE_POSITIONS:
        return None
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"):
        if isinstance(config.get(name), int) and config[name] > 0:
            return max(int(config[name]), _stretched(config, int(config[name])))
    return None


def _stretched(config: Mapping[str, Any], stated: int) -> int:
    """The length that a scaling of rotary positions reaches, 0 where there is none that counts."""
    if str(config.get("model_type", "")).startswith(STRETCHED_ALREADY):
        return 0
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name)
        if not isinstance(rope, Mapping):
            continue
        kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
        if kind in STRETCHING and isinstance(factor, int | float):
            original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
            return int(factor * (original if isinstance(original, int) and original > 0 else stated))
    return 0


def runs_beyond(config: Mapping[str, Any]) -> bool:
    """Whether a model computes positions beyond its `context_limit`: rotary ones it does, a table has an end."""
    config = config.get("text_config") or config
    return config.get("model_type") not in TABLES and not any(name in config for name in ("n_positions", "n_ctx"))


def side_limits(config: Mapping[str, Any]) -> SideLimits:
    """The longest prompt that an encoder's positions allow, and the longest answer that its decoder's do."""
    found = {}
    for side in ("encoder", "decoder"):
        own = config.get(f"max_{side}_position_embeddings")
        inner = config.get(side)
        found[side] = own or context_limit(inner if isinstance(inner, Mapping) else config)
    return SideLimits(found["encoder"], found["decoder"])


def text_limits(config: Mapping[str, Any], max_length: int | None = None) -> int | SideLimits | None:
    """The most tokens that a model with this configuration is given: of a row, or of each side.

    What it is made for; a longer `max_length` that is asked for by name where it can compute that (`length_warning`).
    How long rows are then is `limit_of_rows` in tokenization/truncation.py.
    """
    if config.get("is_encoder_decoder"):
        return side_limits(config)
    limit = context_limit(config)
    return max_length if limit and max_length and max_length > limit and runs_beyond(config) else limit


def length_warning(source: ModelSource, max_length: int | None) -> str | None:
    """What follows from a `--max-length` beyond what a model is made for, None where nothing does."""
    limit = None if source.is_encoder_decoder else context_limit(source.config)
    if limit is None or max_length is None or max_length <= limit or not runs_beyond(source.config):
        return None
    return (
        f"--max-length {max_length} is more than the {limit:,} tokens that {source.name} is made for by its "
        "config.json (scaling of positions included): longer rows are computed at positions that it was not trained "
        "on, and their log-probs may mean little"
    )


def embedding_rows(source: ModelSource) -> int:
    """How many token ids the model has rows for: by the weights' own shape, else the configuration's vocab_size."""
    rows = adapter_files.embedding_rows(source.adapter_files) or files.embedding_rows(source.weights)
    if rows is not None:
        return rows
    config = source.config.get("text_config") or source.config
    if not isinstance(config.get("vocab_size"), int):
        raise ModelError(f"{source.name}: neither its weights nor its config.json say how many token ids it knows")
    return int(config["vocab_size"])
