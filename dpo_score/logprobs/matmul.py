"""True fp32 matrix products at full speed on the CPU.

torch sends fp32 products to MKL, which runs AVX2-class code on processors that are not Intel's; oneDNN uses what
is there (2.1-2.4 times faster on Zen 5). The switch torch offers is named for bf16, and on processors with AMX
tiles it really may round to bf16: so it is used only where there are none and where a product checked here
against float64 proves to be true fp32. The flag is process-global: it is set in a context and restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

TRUE_FP32 = 1e-5
"""Largest accepted relative error of the checked product; fp32 gives 1e-6, bf16 inputs 4e-3."""


def suffix(device_kind: str, dtype: str) -> str:
    """What the kernel name says about fp32 products: `+onednn` where the switch is safe, else nothing."""
    return "+onednn" if device_kind == "cpu" and dtype == "float32" and onednn_is_true_fp32() else ""


@contextmanager
def onednn(wanted: bool) -> Iterator[None]:
    """Run fp32 CPU products through oneDNN inside the block if wanted and safe here."""
    if not (wanted and onednn_is_true_fp32()):
        yield
        return
    with _switched():
        yield


@cache
def onednn_is_true_fp32() -> bool:
    """Whether the switch exists, no AMX tiles are there, and a product under it keeps fp32 accuracy."""
    if not hasattr(_matmul_settings(), "fp32_precision") or not torch._C._has_mkldnn:
        return False
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if has_tiles is None or has_tiles():
        return False
    with _switched():
        return _worst_relative_error() < TRUE_FP32


def _worst_relative_error() -> float:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(128, 256, generator=generator), torch.randn(256, 192, generator=generator)
    exact = a.double() @ b.double()
    scale = a.double().abs() @ b.double().abs()
    plain, batched = a @ b, torch.bmm(a[None], b[None])[0]
    return max(float(((got.double() - exact).abs() / scale).max()) for got in (plain, batched))


@contextmanager
def _switched() -> Iterator[None]:
    matmul = _matmul_settings()
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _matmul_settings() -> Any:
    return getattr(torch.backends.mkldnn, "matmul", None)
