"""The fold of a tile of the head's products as generated code: it reads them twice, head.Fold.add six times.

Worth it in 16 bits; in fp32 products take ten times as long as their fold on a CPU. Checked before it is used: code
that was generated on this machine is compared with float64 on tiles of several widths.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dpo_score.models.parts import shaped


@cache
def compiled_fold(scale: float, cap: float | None) -> Any:
    """(products [N, V], top [N], mass [N]) → top and mass with this tile, as `head.Fold.add` has them."""

    def fold(products_NV: Tensor, top: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = shaped(products_NV.to(torch.float32, copy=True), scale, cap)
        highest = torch.maximum(top, logits_NV.amax(1))
        base = torch.where(torch.isfinite(highest), highest, torch.zeros_like(highest))
        shift = torch.where(highest == top, torch.zeros_like(top), top - highest)
        return highest, mass * shift.exp() + (logits_NV - base[:, None]).exp().sum(1)

    return torch.compile(fold, dynamic=True)


@cache
def is_right(scale: float, cap: float | None, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether three tiles, the last a narrow one, fold to the log Σ exp that float64 gives on the host."""
    generator = torch.Generator().manual_seed(0)
    products = (8 * torch.randn(67, 300, generator=generator)).to(dtype)
    top, mass = torch.full((67,), -math.inf, device=device), torch.zeros(67, device=device)
    with torch.inference_mode():
        for begin in range(0, products.shape[1], 128):
            tile = products[:, begin : begin + 128].to(device)
            top, mass = compiled_fold(scale, cap)(tile, top, mass)
    exact = torch.logsumexp(shaped(products.double(), scale, cap), 1)
    return torch.allclose(top.cpu().double() + mass.cpu().double().log(), exact, rtol=1e-6, atol=1e-5)
