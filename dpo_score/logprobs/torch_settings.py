"""Process-wide torch settings that numerics fix, for the length of a block, and restored after it; and what of the
numerics this machine can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from dpo_score.logprobs import matmul as gemm
from dpo_score.logprobs.attention import flash_flex as attention_gpu
from dpo_score.logprobs.host_memory import kept
from dpo_score.logprobs.numerics import Numerics

ONEDNN = "+onednn"


def present(device: str) -> bool:
    """Whether this machine has the device."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        return int(index or 0) < torch.cuda.device_count()
    return kind != "mps" or torch.backends.mps.is_available()


def in_effect(numerics: Numerics) -> Numerics:
    """`numerics` with the kernel that runs here: a run may go on where the one that it began with is not to be had."""
    kernel = numerics.kernel
    if kernel.endswith(ONEDNN) and not gemm.onednn_is_true_fp32():
        kernel = kernel.removesuffix(ONEDNN)
    if kernel == "varlen" and present(numerics.device):
        kernel = attention_gpu.kernel()
    return replace(numerics, kernel=kernel)


@contextmanager
def running(numerics: Numerics) -> Iterator[None]:
    """Thread count, how fp32 products are made (oneDNN where the kernel says so, never TF32 on CUDA), kept memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(numerics.threads)
    try:
        with gemm.onednn(numerics.kernel.endswith(ONEDNN)), _no_tf32(numerics.device_kind), kept():
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
