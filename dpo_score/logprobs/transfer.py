"""Arrays of the host to a device, and values of a device back to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_score.logprobs.types import Values


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """A copy on the device (on a CPU the array itself); to CUDA from pinned memory, so that the host goes on."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def split(values: Mapping[str, Tensor], counts: Sequence[int]) -> list[Values]:
    """Values of a batch, copied to the host and cut by sequence."""
    cuts = np.cumsum(counts)[:-1]
    parts = {name: np.split(tensor.float().cpu().numpy(), cuts) for name, tensor in values.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(counts))]
