"""One process among several of this machine that hold one model between them: its rank, and what all ranks compute.

Promises: every rank joins once, with a bound on how long it waits for the others; a sum is the same bits on all ranks.
Does not: start processes, or say what they do (rank_zero.py, logprobs/rank_worker.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVE_SECONDS = 300.0
"""How long one rank waits for the others in a collective, and rank 0 for an answer once it is done itself."""
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
"""Ranks are on one machine: gloo need not know what else its network cards are called."""


class Group:
    """One rank's place among `size`; on GPUs each has the device of its number. At most one group a process."""

    def __init__(self, rank: int, size: int, device_kind: str, meeting: Path) -> None:
        self.rank, self.size = rank, size
        self._device = torch.device(device_kind, rank) if device_kind == "cuda" else None
        if self._device is not None:
            torch.cuda.set_device(self._device)
        named = os.environ.get("GLOO_SOCKET_IFNAME", LOOPBACK.get(sys.platform))
        with _environment(**({} if named is None else {"GLOO_SOCKET_IFNAME": named})):
            dist.init_process_group(
                BACKENDS[device_kind],
                store=dist.FileStore(str(meeting), size),  # type: ignore[attr-defined]
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=COLLECTIVE_SECONDS),
                device_id=self._device,
            )
        joined(self)

    def reading(self) -> AbstractContextManager[None]:
        """For the time in which transformers deals out weights: it places them by an environment variable.

        Only for that time: whoever finds it set later, a trainer in this process say, takes itself for one of many.
        """
        return _environment(LOCAL_RANK=str(0 if self._device is None else self.rank))

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
        """[first, end) of `total` things divided in order, as torch shards a dimension."""
        each = -(-total // self.size)
        return min(self.rank * each, total), min((self.rank + 1) * each, total)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_joined: Group | None = None


def joined(group: Group | None) -> None:
    """This process is in `group` from now on, or in none."""
    global _joined
    _joined = group


def group_of(model: Any) -> Group | None:
    """The group that holds `model` between its ranks; None for a model that is whole."""
    return _joined if getattr(model, "tp_size", None) else None


def own_group() -> Group:
    """The group that this process is in; there must be one."""
    assert _joined is not None, "only the ranks of a group read models in parts"
    return _joined
