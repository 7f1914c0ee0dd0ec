"""Process-wide torch settings that numerics fix, for the length of a block, and restored after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpo_score.logps import gemm
from dpo_score.logps.host_memory import kept
from dpo_score.logps.numerics import Numerics


@contextmanager
def running(numerics: Numerics) -> Iterator[None]:
    """Thread count, how fp32 products are made (oneDNN where the kernel says so, never TF32 on CUDA), kept memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(numerics.threads)
    try:
        with gemm.onednn(numerics.kernel.endswith("+onednn")), _no_tf32(numerics.device_kind), kept():
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_tf32(device_kind: str) -> Iterator[None]:
    if device_kind != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
