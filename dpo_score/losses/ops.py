"""The few functions that loss formulas are written with, for three kinds of array.

NumPy float64 (scoring), torch tensors (training, differentiable) and `Dual` (NumPy with a derivative). torch is
imported only when a tensor arrives. Every function is elementwise, so the value of a pair does not depend on the other
pairs; `rank_partner` is the one exception. `Dual` is our own because torch would add 2.4 s to the start of `rescore`,
which needs nothing else from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Operand: TypeAlias = "Dual | NDArray[np.float64] | float"


class Dual:
    """`value` with `slope` = ∂value/∂(the seeded input). Plain arrays and numbers mix in as constants."""

    __slots__ = ("slope", "value")
    __array_ufunc__ = None  # so that ndarray + Dual asks Dual, instead of looping over objects

    def __init__(self, value: NDArray[np.float64], slope: NDArray[np.float64]) -> None:
        self.value = value
        self.slope = slope

    @classmethod
    def seed(cls, value: NDArray[np.float64]) -> Dual:
        return cls(value, np.ones_like(value))

    def __neg__(self) -> Dual:
        return Dual(-self.value, -self.slope)

    def __add__(self, other: Operand) -> Dual:
        if isinstance(other, Dual):
            return Dual(self.value + other.value, self.slope + other.slope)
        return Dual(self.value + other, self.slope)

    def __sub__(self, other: Operand) -> Dual:
        if isinstance(other, Dual):
            return Dual(self.value - other.value, self.slope - other.slope)
        return Dual(self.value - other, self.slope)

    def __rsub__(self, other: Operand) -> Dual:
        return -self + other

    def __mul__(self, other: Operand) -> Dual:
        if isinstance(other, Dual):
            return Dual(self.value * other.value, self.slope * other.value + self.value * other.slope)
        return Dual(self.value * other, self.slope * other)

    def __truediv__(self, other: Any) -> Dual:
        """Division by a constant only: no loss divides by a log-probability."""
        return Dual(self.value / other, self.slope / other)

    __radd__ = __add__
    __rmul__ = __mul__


Array: TypeAlias = Any
"""NDArray[np.float64], torch.Tensor or Dual: one formula serves the three."""
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A function with its NumPy form, its torch form and its derivative."""

    numpy: Callable[[Floats], Floats]
    torch: Callable[[Any, Any], Any]
    derivative: Callable[[Floats], Floats]

    def __call__(self, x: Array) -> Array:
        if isinstance(x, Dual):
            return Dual(self.numpy(x.value), self.derivative(x.value) * x.slope)
        if is_tensor(x):
            import torch

            return self.torch(torch, x)
        return self.numpy(x)


def is_tensor(x: object) -> bool:
    """True for a torch tensor, without importing torch for anything else."""
    return type(x).__module__.partition(".")[0] == "torch"


def _sigmoid(x: Floats) -> Floats:
    """Both branches exponentiate −|x|: no overflow, full relative precision in either tail."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def _log_sigmoid(x: Floats) -> Floats:
    return -np.logaddexp(0.0, -x)


def _log1mexp(x: Floats) -> Floats:
    """log(1 − eˣ) for x ≤ 0, switching at −ln 2 (Mächler 2012, "Accurately computing log(1 − exp(−|a|))")."""
    near_zero = np.log(-np.expm1(np.maximum(x, -math.log(2.0))))
    return np.where(x > -math.log(2.0), near_zero, np.log1p(-np.exp(np.minimum(x, -math.log(2.0)))))


def _torch_log1mexp(torch: Any, x: Any) -> Any:
    """The clamps keep the branch that is not taken finite, so that its zero gradient stays zero."""
    switch = -math.log(2.0)
    near_zero = torch.log(-torch.expm1(x.clamp(min=switch)))
    return torch.where(x > switch, near_zero, torch.log1p(-torch.exp(x.clamp(max=switch))))


sigmoid = Elementwise(_sigmoid, lambda torch, x: torch.sigmoid(x), lambda x: _sigmoid(x) * _sigmoid(-x))
log_sigmoid = Elementwise(
    _log_sigmoid, lambda torch, x: torch.nn.functional.logsigmoid(x), lambda x: _sigmoid(np.negative(x))
)
exp = Elementwise(np.exp, lambda torch, x: torch.exp(x), np.exp)
relu = Elementwise(lambda x: np.maximum(x, 0.0), lambda torch, x: torch.relu(x), lambda x: np.where(x > 0, 1.0, 0.0))
log1mexp = Elementwise(_log1mexp, _torch_log1mexp, lambda x: np.exp(x) / np.expm1(x))


def clamp_max(x: Array, limit: float) -> Array:
    """min(x, limit); the derivative is 1 up to and including the limit, as torch has it."""
    if isinstance(x, Dual):
        return Dual(np.minimum(x.value, limit), np.where(x.value <= limit, x.slope, 0.0))
    return x.clamp(max=limit) if is_tensor(x) else np.minimum(x, limit)


def detached(x: Array) -> Array:
    """The value alone, as a constant for differentiation."""
    if isinstance(x, Dual):
        return x.value
    return x.detach() if is_tensor(x) else x


def rank_partner(x: Array, other: Array) -> Array:
    """For each element of `x`, the element of `other` that has the same rank. Depends on the whole set.

    Ties in `x` keep their order (stable sort), so the result is a function of the rows and their order alone.
    """
    values: Array = x.value if isinstance(x, Dual) else x
    partners: Array = other.value if isinstance(other, Dual) else other
    if is_tensor(values):
        ranks = values.argsort(stable=True).argsort()
        return partners.sort().values[ranks]
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return np.sort(partners)[ranks]
