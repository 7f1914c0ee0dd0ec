"""Where numerics are decided: every `auto` becomes a value here, once, and the record is kept with the run.

A resumed run, another worker and every policy read that record (`models/numerics.py` says what it holds); `in_effect`
says what of it this machine can do. Importable without torch. Whether the numbers are right on the model at hand is
asked later, of the loaded model itself (`self_check.py`).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpo_score.config.schema import ComputeSpec
from dpo_score.errors import ConfigError
from dpo_score.logprobs.compilation import compile_failure, tried
from dpo_score.models import memory
from dpo_score.models.limits import text_config
from dpo_score.models.numerics import Kernel, Numerics

COMPILE_SECONDS = 180.0
"""Estimated seconds of the whole job from which per-layer compilation (about 15 s, once) is worth it."""
COMPILE_COST = 20.0
"""Seconds that compiling layers for a GPU takes."""
SAVED_BYTES, MEMORY_SPEED = 110.0, 4e12
"""Bytes that a compiled layer does not move, by token and width (counted on the operators of a Llama layer: 150, of
which compiled code spares three quarters); bytes a second of a recent GPU's memory."""
TOKENS_PER_ROW = 300
"""Unique tokens of a typical preference pair, for the estimate alone."""
SPEED = {"cpu": 3e11, "mps": 2e12, "cuda": 3e14}
"""FLOP/s a device kind may be expected to deliver, for the estimate alone."""
SLOWER_KERNELS = {
    Kernel.VARLEN: (Kernel.FLEX, Kernel.BMM),
    Kernel.FLEX: (Kernel.BMM,),
    Kernel.SDPA: (Kernel.BMM,),
}
"""Kernels for the same packs; the last one runs anywhere."""
SMALL_PACK = 2048
"""Packs of fewer tokens leave a GPU waiting."""
NOT_SHAREABLE = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "ssm", "chunked_attention"})
"""Layer types whose state or mask cannot start again behind a shared prompt."""


def with_own_softmax(numerics: Numerics) -> Numerics:
    """The plain path with a log-softmax in the model's dtype; float32 numerics are that already."""
    if numerics.dtype == "float32":
        return numerics
    return replace(numerics, path="plain", kernel=Kernel.MODEL_OWN_SOFTMAX, compile=False)


def resolve_numerics(
    compute: ComputeSpec, config: Mapping[str, Any], parameters: int | None, rows_hint: int | None = None
) -> Numerics:
    """Every `auto` of `compute` as a value, for a model with this config.json on this machine.

    `parameters` and `rows_hint` (rows of the whole job) only steer batch size and compilation. Raises
    ConfigError for a device this machine lacks.
    """
    device = _device(compute.device)
    kind = device.split(":")[0]
    dtype = compute.dtype if compute.dtype != "auto" else ("float32" if kind == "cpu" else "float16")
    path = compute.path if compute.path != "auto" else ("fast" if may_share(config) or may_fork(config) else "plain")
    ways = compute.tensor_parallel
    each = None if parameters is None else parameters // ways
    return Numerics(
        device=device,
        device_kind=kind,
        dtype=dtype,
        path=path,
        kernel=_kernel(path, kind, dtype, forked=may_fork(config)),
        compile=ways == 1 and _compile(compute.compile, path, kind, config, parameters, rows_hint),
        batch_tokens=(
            memory.batch_tokens(device, dtype, config, each, compute.quantization, _spread(compute))
            if compute.batch_tokens == "auto"
            else compute.batch_tokens
        ),
        threads=_threads(compute.threads),
        tensor_parallel=ways,
    )


def remarks(compute: ComputeSpec, numerics: Numerics) -> list[str]:
    """One line for each `auto` that found less here than there usually is."""
    if numerics.device_kind != "cuda":
        return []
    found = []
    wants_compiling = compute.compile == "auto" and numerics.path == "fast" and numerics.tensor_parallel == 1
    if wants_compiling and not numerics.compile and (failure := tried("cuda")):
        found.append(f"layers are not compiled, which costs speed and no correctness: {failure}")
    if compute.batch_tokens == "auto" and numerics.batch_tokens < SMALL_PACK:
        found.append(
            f"packs hold {numerics.batch_tokens:,} tokens: the weights leave little room on {numerics.device}, which "
            "costs speed. More room: --quantization nf4, --device-map auto, or --tensor-parallel N"
        )
    return found


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


def may_fork(config: Mapping[str, Any]) -> bool:
    """Whether the architecture has layers with a state that a prompt leaves behind and its answers go on from.

    As for `may_share`, a yes is only a candidate.
    """
    if config.get("is_encoder_decoder"):
        return False
    states = NOT_SHAREABLE - {"chunked_attention"}
    if states & set(text_config(config).get("layer_types") or ()):
        return True
    return any(getattr(c, "_is_stateful", False) for c in _model_classes(str(config.get("model_type", ""))))


def _uses_attention_interface(model_type: str) -> bool:
    classes = _model_classes(model_type)
    return any(_calls_the_interface(c) and not getattr(c, "_is_stateful", False) for c in classes)


def _model_classes(model_type: str) -> Sequence[Any]:
    """The classes of transformers that give logits for text of a type."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    if model_type not in CONFIG_MAPPING:
        return ()
    config_class = CONFIG_MAPPING[model_type]
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if config_class in auto._model_mapping:
            found = auto._model_mapping[config_class]
            return found if isinstance(found, tuple) else (found,)
    return ()


def _calls_the_interface(model_class: Any) -> bool:
    """Whether its attention is looked up by name: by what the class says, or by what its module imports for it."""
    module = sys.modules[model_class.__module__]
    return bool(model_class._supports_attention_backend or hasattr(module, "ALL_ATTENTION_FUNCTIONS"))


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


def _kernel(path: str, kind: str, dtype: str, forked: bool) -> Kernel:
    """How attention and fp32 products run; torch's fused attention on a CPU has no oneDNN products."""
    from dpo_score.logprobs.matmul import onednn_is_true_fp32

    onednn = kind == "cpu" and dtype == "float32" and onednn_is_true_fp32()
    if path == "plain":
        return Kernel.MODEL_ONEDNN if onednn else Kernel.MODEL
    if forked:
        return Kernel.FORKED_ONEDNN if onednn else Kernel.FORKED
    if kind == "cuda":
        from dpo_score.logprobs.attention.flash_flex import kernel

        return kernel()
    if onednn:
        return Kernel.BMM_ONEDNN
    return Kernel.SDPA if kind == "cpu" else Kernel.BMM


def present(device: str) -> bool:
    """Whether this machine has the device."""
    import torch

    kind, _, index = device.partition(":")
    if kind == "cuda":
        return int(index or 0) < torch.cuda.device_count()
    return kind != "mps" or torch.backends.mps.is_available()


def in_effect(numerics: Numerics) -> Numerics:
    """`numerics` with the kernel that runs here: a run may go on where the one that it began with does not exist."""
    from dpo_score.logprobs.attention import flash_flex
    from dpo_score.logprobs.matmul import onednn_is_true_fp32

    kernel = numerics.kernel
    if kernel.onednn and not onednn_is_true_fp32():
        kernel = kernel.without_onednn
    if kernel == Kernel.VARLEN and present(numerics.device):
        kernel = flash_flex.kernel()
    return replace(numerics, kernel=kernel)


def ways(numerics: Numerics) -> Iterator[Numerics]:
    """`numerics`, then slower ways to compute the same, down to one row at a time. A model that gets wrong values in
    one way is computed in the next (`self_check.py`)."""
    yield numerics
    plain = numerics
    if numerics.path == "fast":
        if numerics.compile:
            yield replace(numerics, compile=False)
        for kernel in SLOWER_KERNELS.get(numerics.kernel, ()):
            yield replace(numerics, kernel=kernel, compile=False)
        plain = on_plain_path(numerics)
        yield plain
        if plain.kernel.onednn:  # what earlier versions went on with
            yield replace(plain, kernel=Kernel.MODEL)
    if not plain.one_row:
        yield one_by_one(plain)


def another_way(numerics: Numerics, way: Numerics) -> Numerics:
    """`numerics`, computed in the way that `way` names."""
    return replace(numerics, path=way.path, kernel=way.kernel, compile=way.compile, one_row=way.one_row)


def on_plain_path(numerics: Numerics) -> Numerics:
    """The same numerics in padded batches through the model's own attention, without generated code."""
    return replace(numerics, path="plain", kernel=numerics.kernel.of_padded_batches, compile=False)


def one_by_one(numerics: Numerics) -> Numerics:
    """The same numerics with a forward for every row."""
    return replace(on_plain_path(numerics), one_row=True)


def _compile(
    asked: str, path: str, kind: str, config: Mapping[str, Any], parameters: int | None, rows: int | None
) -> bool:
    if asked != "auto" or path == "plain":
        return asked == "on" and path == "fast"
    if kind == "mps" or parameters is None or rows is None:
        return False
    tokens = rows * TOKENS_PER_ROW
    if kind == "cuda":
        pays = tokens * saved_by_compiling(config) > COMPILE_COST
    else:
        pays = 2.0 * parameters * tokens / SPEED[kind] > COMPILE_SECONDS
    return pays and _can_compile(kind)


def saved_by_compiling(config: Mapping[str, Any]) -> float:
    """Seconds a token that compiled layers save on a GPU: elementwise work there is bound by memory, and compiled it
    moves less."""
    text = text_config(config)
    layers, width = (int(text.get(name) or 0) for name in ("num_hidden_layers", "hidden_size"))
    return layers * width * SAVED_BYTES / MEMORY_SPEED


def _spread(compute: ComputeSpec) -> int:
    """Over how many devices --device-map lays the layers of a model."""
    import torch

    return max(torch.cuda.device_count(), 1) if compute.device_map is not None else 1


def _can_compile(kind: str) -> bool:
    """Whether Inductor finds what it needs here: a C++ compiler for the CPU; on CUDA it is tried."""
    if kind == "cuda":
        return compile_failure("cuda") is None
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name)


def _threads(asked: int | None) -> int:
    import torch

    return asked or torch.get_num_threads()
