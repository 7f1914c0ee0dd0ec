"""The choices that change the last bits of a log-probability, as a record that is made once and kept with a run.

`logprobs/numerics.py` decides them; this module only says what they are. Importable without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from dpo_score.errors import DamageError


class Kernel(StrEnum):
    """How attention, fp32 products and the softmax are computed. The values are what records hold."""

    MODEL = "model"
    """The model's own attention (padded batches)."""
    MODEL_ONEDNN = "model+onednn"
    """The same, with fp32 products through oneDNN."""
    MODEL_OWN_SOFTMAX = "model+own-softmax"
    """The same, with the log-softmax in the model's dtype."""
    BMM = "bmm"
    """Packs: attention as batched products."""
    BMM_ONEDNN = "bmm+onednn"
    SDPA = "sdpa"
    """Packs: torch's fused attention on a CPU, one segment at a time."""
    FORKED = "forked"
    """Models with a state: a prompt is read once, and its state is copied for each answer."""
    FORKED_ONEDNN = "forked+onednn"
    VARLEN = "varlen"
    """Packs: torch's flash kernel for sequences of different lengths (CUDA)."""
    FLEX = "flex"
    """Packs: FlexAttention (CUDA)."""

    @property
    def onednn(self) -> bool:
        """Whether fp32 products go through oneDNN."""
        return self in (Kernel.MODEL_ONEDNN, Kernel.BMM_ONEDNN, Kernel.FORKED_ONEDNN)

    @property
    def without_onednn(self) -> Kernel:
        return Kernel(self.value.removesuffix("+onednn"))

    @property
    def forked(self) -> bool:
        """Whether prompts are read once by copies of the model's own state."""
        return self in (Kernel.FORKED, Kernel.FORKED_ONEDNN)

    @property
    def of_padded_batches(self) -> Kernel:
        """The kernel of the plain path with products made in the same way."""
        return Kernel.MODEL_ONEDNN if self.onednn else Kernel.MODEL


@dataclass(frozen=True, slots=True)
class Numerics:
    """Concrete values only, never `auto`.

    `device` is e.g. `cuda:0`, `device_kind` its first part; `dtype` `float32`, `float16` or `bfloat16`; `path` `fast`
    (shared packs) or `plain` (padded batches). `batch_tokens`: most tokens of a pack. `tensor_parallel`: how many
    ranks hold the model between them. `one_row`: every row is computed in a forward of its own.
    """

    device: str
    device_kind: str
    dtype: str
    path: str
    kernel: Kernel
    compile: bool
    batch_tokens: int
    threads: int
    tensor_parallel: int = 1
    one_row: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", Kernel(self.kernel))

    def to_json(self) -> dict[str, Any]:
        """The record. Fields that came later are left out where they have their usual value: old records stay equal."""
        found = asdict(self) | {"kernel": str(self.kernel)}
        if self.tensor_parallel == 1:
            del found["tensor_parallel"]
        if not self.one_row:
            del found["one_row"]
        return found

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Numerics:
        """The inverse of `to_json`; keys of later versions are ignored. DamageError for a wrong or missing value."""
        given = {"tensor_parallel": 1, "one_row": False, **record}
        for name, holds in _VALUES.items():
            if not holds(given.get(name)):
                raise DamageError(f"stored numerics hold {name}: {given.get(name)!r:.60}, which it cannot be")
        return cls(**{f.name: given[f.name] for f in fields(cls)})


def _count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


_VALUES: Mapping[str, Callable[[Any], bool]] = {
    "device": lambda value: isinstance(value, str),
    "device_kind": lambda value: isinstance(value, str),
    "dtype": lambda value: value in ("float32", "float16", "bfloat16"),
    "path": lambda value: value in ("fast", "plain"),
    "kernel": lambda value: value in list(Kernel),
    "compile": lambda value: isinstance(value, bool),
    "batch_tokens": _count,
    "threads": _count,
    "tensor_parallel": _count,
    "one_row": lambda value: isinstance(value, bool),
}
"""What each field of a record may hold."""
