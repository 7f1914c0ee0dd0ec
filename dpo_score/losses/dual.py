"""Forward-mode derivatives for the loss formulas: a value and its slope, elementwise, float64 NumPy.

Promises the exact derivative (chain rule, no step size) of anything written with + − × ÷ and the primitives of
array.py. Does not promise second derivatives, broadcasting between different shapes, or reductions.
"""

from __future__ import annotations

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
