"""Process-wide settings of torch and of the C library while passes run, restored afterwards.

Threads; fp32 products through oneDNN where the kernel says so; on CUDA no TF32, and no sums in 16 bits inside a
product; freed host memory is kept (heap.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dpo_score.heap import host_memory_kept
from dpo_score.logprobs.matmul import onednn
from dpo_score.models.numerics import Numerics


@contextmanager
def running(numerics: Numerics) -> Iterator[None]:
    """The settings of `numerics` inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(numerics.threads)
    try:
        with onednn(numerics.kernel.onednn), exact_cuda_products(numerics.device_kind), host_memory_kept():
            yield
    finally:
        torch.set_num_threads(threads)


REDUCED = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
"""Settings of CUDA's products that let sums be made in 16 bits: the error would depend on the size of a pack."""


@contextmanager
def exact_cuda_products(device_kind: str) -> Iterator[None]:
    """On CUDA: fp32 products and convolutions in fp32, not TF32, and sums of 16-bit products in fp32.

    Through torch's settings by operator: those that older programs use cannot be read once the new ones are set.
    """
    if device_kind != "cuda":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    convolution: Any = getattr(torch.backends.cudnn, "conv", None)
    wanted: list[tuple[Any, str, Any]] = [(matmul, "fp32_precision", "ieee")]
    if hasattr(convolution, "fp32_precision"):
        wanted.append((convolution, "fp32_precision", "ieee"))
    wanted += [(matmul, name, False) for name in REDUCED]
    before: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, value in wanted:
            found = _setting(owner, name)
            if found is not None:
                before.append((owner, name, found))
                setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


def _setting(owner: Any, name: str) -> Any:
    """The value of a setting, or None where this torch does not know it."""
    try:
        return getattr(owner, name)
    except (AttributeError, RuntimeError):
        return None
