"""How many tokens a device should take at once, what that costs at most, and what running out of memory looks like.

Sizes follow total memory, never free memory: the plan must not depend on what else runs. Importable without torch.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_score.errors import ModelError
from dpo_score.models.adapter_files import module_of
from dpo_score.models.limits import text_config
from dpo_score.models.weights import tensor_shapes

if TYPE_CHECKING:
    from dpo_score.models.numerics import Numerics

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
QUANTIZED_BYTES = {"int8": 1.1, "nf4": 0.6}
"""Bytes a parameter with its scales; embeddings, norms and the head keep 16 bits, a few per cent of a large model."""
CPU_TOKENS = 4096
"""Speed on a CPU is flat from 1,024 tokens on; 4,096 fills packs well and keeps activations small."""
GPU_TOKENS = ((1e9, 65536), (3e9, 32768), (float("inf"), 16384))
"""(parameters up to, tokens): small models need larger packs to keep a GPU busy."""
SHARE = 0.35
"""Share of the memory beside the weights that activations of a full pack may take."""
SCRATCH = {"cpu": 2**27, "cuda": 2**30}
"""Attention scores of one block and logits of one tile, with the copies their reductions make."""
FLOOR, STEP = 256, 256


def batch_tokens(
    device: str,
    dtype: str,
    config: Mapping[str, Any],
    parameters: int | None,
    quantization: str | None = None,
    spread: int = 1,
) -> int:
    """The token budget of a pack (a multiple of 256, at least 256) for this device's total memory.

    `parameters`: of the part that one rank holds. `spread`: devices that the layers are laid over.
    """
    kind = device.split(":")[0]
    wanted = CPU_TOKENS if kind != "cuda" else next(n for size, n in GPU_TOKENS if (parameters or 7e9) <= size)
    width = QUANTIZED_BYTES[quantization] if quantization else ITEM_BYTES[dtype]
    room = total_memory(device) - (parameters or 0) * width / spread
    fits = int(max(room, 0) * SHARE / token_bytes(config, dtype))
    return max(FLOOR, min(wanted, fits) // STEP * STEP)


def peak_bytes(config: Mapping[str, Any], numerics: Numerics, parameters: int, longest: int) -> int:
    """The bound on memory that scoring keeps to: weights, one pack (or one row of `longest` tokens, if that is more),
    and scratch that grows with neither rows nor vocabulary. Of the fast path; the plain path masks and pads beside it.
    """
    pack = max(numerics.batch_tokens, longest) * token_bytes(config, numerics.dtype)
    scratch = SCRATCH.get(numerics.device_kind, SCRATCH["cpu"])
    return parameters // numerics.tensor_parallel * ITEM_BYTES[numerics.dtype] + pack + scratch


def clone_bytes(base: Sequence[Path], adapters: Sequence[Path], parameters: int) -> int:
    """Host memory of the float32 clones that adapters merged into one base are undone with (lora.py): of the
    base's modules that their tensors name, or of all `parameters` where file and names do not say."""
    files = (*base, *adapters)
    if any(path.suffix != ".safetensors" for path in files):
        return parameters * ITEM_BYTES["float32"]
    modules: dict[str, int] = {}
    for path in base:
        for name, shape in tensor_shapes(path).items():
            module = name.rpartition(".")[0]
            modules[module] = modules.get(module, 0) + prod(shape)
    touched = {module_of(key, modules) for path in adapters for key in tensor_shapes(path)}
    return ITEM_BYTES["float32"] * (parameters if "" in touched else sum(modules[name] for name in touched))


def token_bytes(config: Mapping[str, Any], dtype: str) -> int:
    """Activation bytes that one token holds at the widest place of a layer (an upper estimate).

    Residual, norm and attention inputs and outputs, the two halves of the MLP with their product, and the fp32
    copies that norms make; experts count as many times as a token visits them.
    """
    text = text_config(config)
    hidden = _number(text, "hidden_size", "n_embd", "d_model", default=4096)
    heads = _number(text, "num_attention_heads", "n_head", "num_heads", default=32)
    width = max(hidden, heads * _number(text, "head_dim", default=hidden // heads))
    middle = _number(text, "intermediate_size", "n_inner", "ffn_dim", "d_ff", default=4 * hidden)
    visits = _number(text, "num_experts_per_tok", default=1)
    return ITEM_BYTES[dtype] * (4 * hidden + 6 * width + 3 * middle * visits) + 4 * 3 * hidden


def kept_bytes() -> int:
    """Host memory for features of pictures that wait for the run's next models: a sixteenth, 4 GiB at most."""
    return min(_host_memory() // 16, 2**32)


def total_memory(device: str) -> int:
    """Bytes of memory the device has in all; for the CPU what this process may use (its cgroup's limit counts)."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device == "mps":
        return int(torch.mps.recommended_max_memory())
    return _host_memory()


def _host_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(name)
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error, most likely a RuntimeError of torch, means that a device or the host ran out of memory."""
    import torch

    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in text for sign in ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


@contextmanager
def room_for(what: str, device: str, dtype: str) -> Iterator[None]:
    """Running out of memory inside is a ModelError with the ways out. Not for packs, which are split instead."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        release(device.split(":")[0])
        said = (str(error).strip() or "out of memory").splitlines()[0]
        raise ModelError(
            f"{what} in {dtype} does not fit on {device} ({said[:200]}). If nothing else uses its memory: a narrower "
            "--dtype, fewer bits with --quantization int8 or nf4, or more devices with --tensor-parallel N or "
            "--device-map auto"
        ) from error


def release(device_kind: str) -> None:
    """Give cached blocks back after running out, so that the smaller attempt starts from a clean pool."""
    import torch

    gc.collect()
    if device_kind == "cuda":
        torch.cuda.empty_cache()
    elif device_kind == "mps":
        torch.mps.empty_cache()


def _number(config: Mapping[str, Any], *names: str, default: int) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, list) and value:
            value = max(value)
        if isinstance(value, int) and value > 0:
            return value
    return default
