"""What the numbers of a model depend on, as one sha256: the bytes of its weights and the settings that matter.

Promises: canonical JSON, so the same content gives the same digest on every machine. Names of folders, file times and
what a tool notes about itself are left out; a key that is null counts, because null and absent may differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

INERT_CONFIG = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "_commit_hash",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
    }
    | {"output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id"}
)
INERT_ADAPTER = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "auto_mapping"}
)


def model_digest(files: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """`files`: name → sha256 of each weight file; `config`: config.json."""
    return _digest("model", files, _live(config, INERT_CONFIG))


def adapter_digest(base: str, files: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """An adapter over the base whose digest is `base`; `config`: adapter_config.json."""
    return _digest(f"adapter over {base}", files, _live(config, INERT_ADAPTER))


def gguf_digest(file: str, converter: int) -> str:
    """A .gguf file by its sha256, read by this version of the converter."""
    return _digest("gguf", {"file": file, "converter": str(converter)}, {})


def _live(config: Mapping[str, Any], inert: frozenset[str]) -> dict[str, Any]:
    """A configuration without the keys that no number depends on, nested configurations included."""
    return {k: _live(v, inert) if isinstance(v, dict) else v for k, v in config.items() if k not in inert}


def _digest(kind: str, files: Mapping[str, str], config: Mapping[str, Any]) -> str:
    text = json.dumps([kind, dict(files), config], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
