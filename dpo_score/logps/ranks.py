"""One process among several of this machine that hold one model between them: its rank, and what all ranks compute.

Promises: every rank joins once, with a bound on how long it waits for the others; a sum is the same bits on all ranks.
Does not: start processes, or say what they do (leader.py, follow.py).
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVE_SECONDS = 300.0
"""How long one rank waits for the others in a collective, and the leader for an answer once it is done itself."""
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
"""Ranks are on one machine: gloo need not know what else its network cards are called."""


class Group:
    """One rank's place among `size`; on GPUs each has the device of its number. At most one group a process."""

    def __init__(self, rank: int, size: int, device_kind: str, meeting: Path) -> None:
        self.rank, self.size = rank, size
        if sys.platform in LOOPBACK:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
        device = torch.device(device_kind, rank) if device_kind == "cuda" else None
        os.environ["LOCAL_RANK"] = str(rank if device is not None else 0)  # what transformers places weights by
        if device is not None:
            torch.cuda.set_device(device)
        dist.init_process_group(
            BACKENDS[device_kind],
            store=dist.FileStore(str(meeting), size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
            device_id=device,
        )
        joined(self)

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, over all ranks."""
        dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """In place, over all ranks. What a NaN becomes is not defined."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def agreed(self, mine: bool, device: torch.device) -> bool:
        """Whether it holds on every rank."""
        return not bool(self.largest(torch.tensor([0.0 if mine else 1.0], device=device)))

    def part(self, total: int) -> tuple[int, int]:
        """[first, end) of `total` things dealt out in order, as torch shards a dimension."""
        each = -(-total // self.size)
        return min(self.rank * each, total), min((self.rank + 1) * each, total)


_joined: Group | None = None


def joined(group: Group | None) -> None:
    """This process is in `group` from now on, or in none."""
    global _joined
    _joined = group


def group_of(model: Any) -> Group | None:
    """The group that holds `model` between its ranks; None for a model that is whole."""
    return _joined if getattr(model, "tp_size", None) else None
