"""The choices that change the last bits of a log-probability, made once and kept with the run.

`auto` is resolved here and nowhere else: a resumed run, another worker and every policy read the record.
Importable without torch. Not here: whether the fast path may be trusted on a model (verify.py decides that).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dpo_score.config.schema import ComputeSpec
from dpo_score.errors import ConfigError
from dpo_score.models.limits import text_config

COMPILE_SECONDS = 180.0
"""Estimated seconds of the whole job from which per-layer compilation (about 15 s, once) is worth it."""
TOKENS_PER_ROW = 300
"""Unique tokens of a typical preference pair, for the estimate alone."""
SPEED = {"cpu": 3e11, "mps": 2e12, "cuda": 3e14}
"""FLOP/s a device kind may be expected to deliver, for the estimate alone."""
NOT_SHAREABLE = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "ssm", "chunked_attention"})
"""Layer types whose state or mask cannot start again behind a shared prompt."""


@dataclass(frozen=True, slots=True)
class Numerics:
    """Concrete values only. `kernel`: how attention and fp32 products run, e.g. `bmm+onednn`, `sdpa`, `varlen`;
    `tensor_parallel`: ranks that hold a model between them."""

    device: str
    device_kind: str
    dtype: str
    path: str
    kernel: str
    compile: bool
    batch_tokens: int
    threads: int
    tensor_parallel: int = 1

    def to_json(self) -> dict[str, Any]:
        """Without `tensor_parallel` where no model is dealt out: such numerics are what they were before it existed."""
        found = asdict(self)
        if self.tensor_parallel == 1:
            del found["tensor_parallel"]
        return found

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Numerics:
        """The inverse of `to_json`; keys of later versions are ignored, a missing key is a KeyError."""
        given = {"tensor_parallel": 1, **record}
        return cls(**{f.name: given[f.name] for f in fields(cls)})


OWN_SOFTMAX = "model+own-softmax"
"""The kernel of numerics whose log-softmax runs in the model's dtype."""


def with_own_softmax(numerics: Numerics) -> Numerics:
    """The plain path with a log-softmax in the model's dtype; float32 numerics are that already."""
    if numerics.dtype == "float32":
        return numerics
    return replace(numerics, path="plain", kernel=OWN_SOFTMAX, compile=False)


def resolve_numerics(
    compute: ComputeSpec, config: Mapping[str, Any], parameters: int | None, rows_hint: int | None = None
) -> Numerics:
    """Every `auto` of `compute` as a value, for a model with this config.json on this machine.

    `parameters` and `rows_hint` (rows of the whole job) only steer batch size and compilation. Raises
    ConfigError for a device this machine lacks.
    """
    from dpo_score.logprobs import matmul as gemm
    from dpo_score.models import memory

    device = _device(compute.device)
    kind = device.split(":")[0]
    dtype = compute.dtype if compute.dtype != "auto" else ("float32" if kind == "cpu" else "float16")
    path = compute.path if compute.path != "auto" else ("fast" if may_share(config) else "plain")
    ways = compute.tensor_parallel
    each = None if parameters is None else parameters // ways
    return Numerics(
        device=device,
        device_kind=kind,
        dtype=dtype,
        path=path,
        kernel=_kernel(path, kind, gemm.suffix(kind, dtype)),
        compile=ways == 1 and _compile(compute.compile, path, kind, parameters, rows_hint),
        batch_tokens=(
            memory.batch_tokens(device, dtype, config, each) if compute.batch_tokens == "auto" else compute.batch_tokens
        ),
        threads=_threads(compute.threads),
        tensor_parallel=ways,
    )


def may_share(config: Mapping[str, Any]) -> bool:
    """Whether the architecture may take the fast path at all, from its configuration alone.

    No: encoder-decoders, recurrent or convolutional or chunked layers, ALiBi, and models outside the attention
    interface. A yes is only a candidate: the fast path is verified on the loaded model before it is used.
    """
    text = text_config(config)
    if config.get("is_encoder_decoder") or text.get("alibi") or text.get("attention_chunk_size"):
        return False
    if NOT_SHAREABLE & set(text.get("layer_types") or ()):
        return False
    return _uses_attention_interface(str(config.get("model_type", "")))


def _uses_attention_interface(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    if model_type not in CONFIG_MAPPING:
        return False
    config_class = CONFIG_MAPPING[model_type]
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if config_class in auto._model_mapping:
            found = auto._model_mapping[config_class]
            candidates = found if isinstance(found, tuple) else (found,)
            return any(c._supports_attention_backend and not getattr(c, "_is_stateful", False) for c in candidates)
    return False


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        if torch.cuda.is_available():
            return "cuda:0"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = asked.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {asked!r}: torch sees no CUDA device here; use --device cpu or auto")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {asked!r}: torch sees no Metal device here; use --device cpu or auto")
    if kind not in SPEED:
        raise ConfigError(f"device {asked!r} is not one of auto, cpu, cuda, cuda:N, mps")
    return f"cuda:{index or 0}" if kind == "cuda" else kind


def _kernel(path: str, kind: str, products: str) -> str:
    """Attention's kernel and how fp32 products run: torch's fused attention knows no oneDNN products."""
    if path == "plain":
        return "model" + products
    if kind == "cuda":
        from dpo_score.logprobs.attention import flash_flex as attention_gpu

        return attention_gpu.kernel() + products
    return "sdpa" if kind == "cpu" and not products else "bmm" + products


def _compile(asked: str, path: str, kind: str, parameters: int | None, rows: int | None) -> bool:
    if asked != "auto" or path == "plain":
        return asked == "on" and path == "fast"
    if kind == "mps" or parameters is None or rows is None or not _can_compile(kind):
        return False
    return 2.0 * parameters * rows * TOKENS_PER_ROW / SPEED[kind] > COMPILE_SECONDS


def _can_compile(kind: str) -> bool:
    """Whether Inductor finds what it needs here: a C++ compiler for the CPU, Triton for CUDA."""
    import importlib.util
    import os
    import shutil

    if kind == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name)


def _threads(asked: int | None) -> int:
    import torch

    return asked or torch.get_num_threads()
