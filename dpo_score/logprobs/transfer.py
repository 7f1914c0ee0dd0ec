"""Arrays of the host to a device, and values of a device back to the host, without either waiting for the other.

On CUDA arrays are copied from pinned memory, on a stream of their own where a thread runs ahead (`copying`), and values
return into pinned memory behind what the device is doing (`Returning`). On a CPU nothing is copied that need not be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_score.logprobs.types import Values


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """A copy on the device (on a CPU the array itself); to CUDA from pinned memory, so that the host goes on."""
    tensor = torch.from_numpy(array)
    if _runs(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _runs(device: torch.device) -> bool:
    """Whether it is a CUDA device of this machine."""
    return device.type == "cuda" and torch.cuda.is_available()


@dataclass(slots=True, eq=False)
class Copies:
    """Copies to a device that were queued on a stream of their own. What they made must live until whatever uses it has
    been computed: its memory belongs to that stream."""

    device: torch.device
    done: Any = None

    def wait(self) -> None:
        """What is queued on the device from now on runs after the copies; the host does not wait."""
        if self.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.done)


@contextmanager
def copying(device: torch.device) -> Iterator[Copies]:
    """`to_device` inside the block goes beside what the device computes."""
    copies = Copies(device)
    if not _runs(device):
        yield copies
        return
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        yield copies
        copies.done = stream.record_event()


@cache
def _copy_stream(device: torch.device) -> Any:
    stream: Any = torch.cuda.Stream
    return stream(device)


class Returning:
    """Values on their way to the host, behind what was queued on the device before."""

    def __init__(self, values: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        self._counts, self._done = counts, None
        floats = {name: tensor.float() for name, tensor in values.items()}
        device = next((tensor.device for tensor in floats.values()), torch.device("cpu"))
        self._values = floats
        if _runs(device):
            self._values = {name: torch.empty(t.shape, pin_memory=True) for name, t in floats.items()}
            for name, tensor in floats.items():
                self._values[name].copy_(tensor, non_blocking=True)
            self._done = torch.cuda.current_stream(device).record_event()

    def arrived(self) -> list[Values]:
        """The values by sequence, once they are here."""
        if self._done is not None:
            self._done.synchronize()
        return split(self._values, self._counts)


def split(values: Mapping[str, Tensor], counts: Sequence[int]) -> list[Values]:
    """Values of a batch, copied to the host and cut by sequence."""
    cuts = np.cumsum(counts)[:-1]
    parts = {name: np.split(tensor.float().cpu().numpy(), cuts) for name, tensor in values.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(counts))]
