"""Model and adapter folders for the tests of resolving and loading, and the two bits every one of them needs."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_score.models.resolve import ModelSource, resolve

IDS = torch.tensor([[72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]])


@dataclass(frozen=True)
class Fp32:
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Bf16:
    dtype: str = "bfloat16"
    device: str = "cpu"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source(folder: Path, adapter: Path | None = None, **options: Any) -> ModelSource:
    """`resolve` with a plain hash and a cache folder that nothing here needs."""
    options = {"cache_dir": folder.parent / "cache", "sha256": sha256, **options}
    return resolve(str(folder), adapter=str(adapter) if adapter else None, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


def read(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def save_adapter(
    folder: Path,
    base: Path,
    seed: int = 1,
    weight: float = 0.05,
    model: PreTrainedModel | None = None,
    **lora: Any,
) -> Path:
    """A LoRA folder over `base` whose every tensor is random (`weight` 0: an adapter that changes nothing)."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **lora})
    wrapped = get_peft_model(model or read(base), config)
    randomise(wrapped, seed, weight)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return folder


def randomise(wrapped: PeftModel, seed: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if not parameter.requires_grad or "lora_A" in name or "lora_embedding_A" in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator) * weight
            parameter.copy_(noise if "lora_" in name and "magnitude" not in name else parameter + noise)


def unmerged_logits(base: Path, adapter: Path) -> torch.Tensor:
    """The slow obvious twin: peft's own wrapper around a freshly read base, nothing merged."""
    return logits(PeftModel.from_pretrained(read(base), adapter).eval())


class Canary:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def write_canary(pickle_file: Path, canary: Path) -> Path:
    pickle_file.write_bytes(pickle.dumps({"weight": Canary(canary)}, protocol=2))
    return canary


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
