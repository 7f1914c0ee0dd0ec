"""Weights of 8 and 4 bits, by bitsandbytes: how they are asked for at load, and kept as they were read.

Does not: read or compute them (transformers and bitsandbytes do).
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from dpo_score.errors import ModelError


def quantization_config(kind: str, dtype: str) -> Any:
    """What transformers is given for `--quantization int8|nf4`; `dtype`: what products are computed in."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"--quantization {kind} needs bitsandbytes: `pip install bitsandbytes`")
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # else a line for every product of every pass
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = getattr(torch, dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def keep_four_bits_unpacked(model: Any) -> None:
    """On CPUs bitsandbytes 0.50 packs 4-bit weights anew at the first pass, and its way back, taken whenever a state
    dict is made (as peft does when it puts an adapter on), gives other weights: log-probs move by hundreds of nats.
    Unpacked they are dequantised as they were read, in the dtype of the products."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def refuse_packed(model: Any, name: str) -> None:
    """ModelError where 4-bit weights are packed all the same: putting an adapter on would change them."""
    if any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in model.parameters()):
        raise ModelError(
            f"{name} is an adapter over 4-bit weights that this version of bitsandbytes has packed for the CPU, and "
            "adding an adapter would change them: leave --quantization nf4 out, use int8, or score it on a GPU"
        )
