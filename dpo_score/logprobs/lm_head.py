"""Hidden states to token log-probabilities, tiled over rows and vocabulary: the full logits never exist.

A tile of logits is folded into a running maximum m and sum s = Σ exp(x − m), rescaled when m rises (online softmax,
Milakov and Gimelshein, arXiv 1805.02867); log p of a target is its logit − m − log s. Sums are fp32. The statistics
of types.STATS come from the same tiles. Memory: one tile and a few numbers per row, whatever N and V are. Ranks that
share a vocabulary fold their own parts, then combine those few numbers: no rank ever sees another's logits.

In 16 bits the fold may run as generated code, which reads a tile twice where `Fold.add` reads it six times (in fp32
products take ten times as long as their fold on a CPU). Code generated on this machine is compared with float64 on
tiles of several widths before it is used.

Shapes: N rows of hidden size H, V vocabulary entries (of this rank), n targets (n ≥ N: one row may predict several).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_score.logprobs.transfer import to_device
from dpo_score.models.parallel.process_group import Group
from dpo_score.models.parts import Head, shaped

CHUNK_LOGITS = 2**24
"""Logits in memory at once in fp32 (64 MB): rows per chunk = this over the vocabulary."""


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities along the last axis, in fp32 as logits − logsumexp: on a CPU torch's fused log_softmax is
    off by some 1e-5 nats a token over a large vocabulary, always to one side, so sums drift."""
    if logits.dtype != torch.float32:
        return torch.log_softmax(logits, dim=-1)
    return logits - torch.logsumexp(logits, dim=-1, keepdim=True)


def read_logits(logits_NV: Tensor, target_N: Tensor, stats: Sequence[str]) -> dict[str, Tensor]:
    """log p of each target (fp32 [N]) and the statistics of `types.STATS`, from fp32 logits."""
    logp_NV = log_softmax(logits_NV)
    values = {"logp": logp_NV.gather(1, target_N[:, None])[:, 0]}
    if "log_sum_sq_probs" in stats:
        values["log_sum_sq_probs"] = torch.logsumexp(2 * logp_NV, dim=-1)
    if "entropy" in stats:
        values["entropy"] = torch.special.entr(logp_NV.exp()).sum(-1)
    if "top1" in stats:
        values["top1"] = (values["logp"] >= logp_NV.amax(-1)).float()
    return values


TILES = {"cpu": (1024, 2048), "cuda": (8192, 8192)}
"""(rows, vocabulary) of a tile: what stays in cache on a CPU, what keeps a GPU's matrix units busy."""
COMPILED_TILES = {**TILES, "cpu": (4096, 1024)}
"""Read twice only, a tile need not stay in the nearest cache, and products of more rows are faster."""


def token_values(
    head: Head,
    hidden_NH: Tensor,
    source_n: NDArray[np.int64],
    target_n: Tensor,
    stats: Sequence[str] = (),
    compiled: bool = False,
) -> dict[str, Tensor]:
    """'logp' and the statistics, fp32 [n]: target j is predicted from row `source_n[j]`.

    `source_n` is an array of the host: the device is never asked which targets belong to a tile of rows.
    `compiled`: products in 16 bits are folded by generated code, which knows no statistics.
    """
    device = hidden_NH.device
    compiled = compiled and not stats and hidden_NH.dtype != torch.float32
    step = _row_step(head, hidden_NH, compiled)
    if len(hidden_NH) <= step:
        return _rows(head, hidden_NH, to_device(source_n, device), target_n, stats, compiled)
    values = {name: torch.empty(len(target_n), device=device) for name in ("logp", *stats)}
    for begin in range(0, len(hidden_NH), step):
        mine = np.flatnonzero((source_n >= begin) & (source_n < begin + step))
        places, sources = to_device(mine, device), to_device(source_n[mine] - begin, device)
        part = _rows(head, hidden_NH[begin : begin + step], sources, target_n[places], stats, compiled)
        for name, value in part.items():
            values[name][places] = value
    return values


def _row_step(head: Head, hidden_NH: Tensor, compiled: bool) -> int:
    if head.weight is None:
        return max(1, CHUNK_LOGITS // head.vocabulary)
    return _tile(hidden_NH.device.type, compiled)[0]


def _tile(kind: str, compiled: bool) -> tuple[int, int]:
    tiles = COMPILED_TILES if compiled else TILES
    return tiles.get(kind, tiles["cuda"])


def _rows(
    head: Head, hidden_NH: Tensor, source_n: Tensor, target_n: Tensor, stats: Sequence[str], compiled: bool
) -> dict[str, Tensor]:
    if head.weight is None:
        return read_logits(head.logits(hidden_NH)[source_n], target_n, stats)
    fold = Fold.empty(len(hidden_NH), source_n, target_n, stats)
    width = _tile(hidden_NH.device.type, compiled)[1]
    for begin in range(0, head.vocabulary, width):
        products_NV = _products(head, hidden_NH, begin, begin + width)
        if compiled:
            fold.add_products(products_NV, head, head.first + begin)
        else:
            fold.add(head.shape(products_NV.float()), head.first + begin)
    if head.group is not None:
        fold.combine(head.group)
    return fold.values()


def _products(head: Head, hidden_NH: Tensor, begin: int, end: int) -> Tensor:
    """W h + b [N, end − begin] of one vocabulary tile: fp32 on CUDA and with a bias, else of the model's dtype."""
    assert head.weight is not None
    weight = head.weight[begin:end]
    if hidden_NH.dtype != weight.dtype:
        weight = weight.to(hidden_NH.dtype)
    if hidden_NH.is_cuda and hidden_NH.dtype != torch.float32:
        products = torch.mm(hidden_NH, weight.T, out_dtype=torch.float32)
    else:
        products = torch.mm(hidden_NH, weight.T)
    return products if head.bias is None else products.float().add_(head.bias[begin:end])


@dataclass(slots=True, eq=False)
class Fold:
    """Running sums over vocabulary tiles. Per row: maximum, Σe^(x−m), and if asked Σe^2(x−m), Σ(x−m)e^(x−m)."""

    source: Tensor
    target: Tensor
    stats: Sequence[str]
    top: Tensor
    mass: Tensor
    squares: Tensor
    moment: Tensor
    logit: Tensor

    @classmethod
    def empty(cls, rows: int, source_n: Tensor, target_n: Tensor, stats: Sequence[str]) -> Fold:
        zeros = torch.zeros(rows, device=source_n.device)
        logit = torch.full((len(target_n),), -math.inf, device=source_n.device)
        return cls(source_n, target_n, stats, zeros - math.inf, zeros, zeros, zeros, logit)

    def add(self, logits_NV: Tensor, begin: int) -> None:
        """One tile; `logits_NV` is overwritten."""
        self._pick(logits_NV, begin)
        top = torch.maximum(self.top, logits_NV.amax(1))
        shift = torch.where(top == self.top, torch.zeros_like(top), self.top - top)
        decay = shift.exp()
        base = torch.where(torch.isfinite(top), top, torch.zeros_like(top))
        offset_NV = logits_NV.sub_(base[:, None])
        weight_NV = offset_NV.exp() if "entropy" in self.stats else offset_NV.exp_()
        if "entropy" in self.stats:
            carried = torch.where(self.mass > 0, self.moment + shift * self.mass, self.moment)
            self.moment = decay * carried + torch.nan_to_num(offset_NV.mul_(weight_NV), nan=0.0).sum(1)
        self.mass = self.mass * decay + weight_NV.sum(1)
        if "log_sum_sq_probs" in self.stats:
            self.squares = self.squares * decay.square() + weight_NV.square_().sum(1)
        self.top = top

    def add_products(self, products_NV: Tensor, head: Head, begin: int) -> None:
        """One tile as the weights give it, in compiled code; no statistics."""
        place, inside = self._places(products_NV, begin)
        self.logit = torch.where(inside, head.shape(products_NV[self.source, place].float()), self.logit)
        self.top, self.mass = compiled_fold(head.scale, head.cap)(products_NV, self.top, self.mass)

    def _pick(self, logits_NV: Tensor, begin: int) -> None:
        place, inside = self._places(logits_NV, begin)
        self.logit = torch.where(inside, logits_NV[self.source, place], self.logit)

    def _places(self, tile_NV: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        """Each target's column in this tile, and whether it is here (without asking the device how many are)."""
        place = self.target - begin
        return place.clamp(0, tile_NV.shape[1] - 1), (place >= 0) & (place < tile_NV.shape[1])

    def combine(self, group: Group) -> None:
        """The fold over the parts of all ranks: the largest maximum, and the sums rescaled to it and added up.

        A NaN stays in the sums, whatever the maximum became.
        """
        highest = group.largest(torch.cat((self.top, self.logit)))
        top, self.logit = highest[: len(self.top)], highest[len(self.top) :]
        shift = torch.where(self.top == top, torch.zeros_like(top), self.top - top)
        decay = shift.exp()
        moment = decay * torch.where(self.mass > 0, self.moment + shift * self.mass, self.moment)
        sums = torch.stack((self.mass * decay, self.squares * decay.square(), moment))
        self.mass, self.squares, self.moment = group.sum(sums).unbind()
        self.top = top

    def values(self) -> dict[str, Tensor]:
        mass, top = self.mass[self.source], self.top[self.source]
        values = {"logp": self.logit - top - mass.log()}
        if "log_sum_sq_probs" in self.stats:
            values["log_sum_sq_probs"] = self.squares[self.source].log() - 2 * mass.log()
        if "entropy" in self.stats:
            values["entropy"] = mass.log() - self.moment[self.source] / mass
        if "top1" in self.stats:
            values["top1"] = (self.logit >= top).float()
        return values


@cache
def compiled_fold(scale: float, cap: float | None) -> Any:
    """(products [N, V], top [N], mass [N]) → top and mass with this tile, as `Fold.add` has them."""

    def fold(products_NV: Tensor, top: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = shaped(products_NV.to(torch.float32, copy=True), scale, cap)
        highest = torch.maximum(top, logits_NV.amax(1))
        base = torch.where(torch.isfinite(highest), highest, torch.zeros_like(highest))
        shift = torch.where(highest == top, torch.zeros_like(top), top - highest)
        return highest, mass * shift.exp() + (logits_NV - base[:, None]).exp().sum(1)

    return torch.compile(fold, dynamic=True)


@cache
def compiled_fold_is_right(scale: float, cap: float | None, dtype: torch.dtype, device: torch.device) -> bool:
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
