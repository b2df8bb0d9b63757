"""What iterative solvers share: when to stop, and the judgment of the last iterate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypergrad.linear.solution import LinearSolver

__all__ = ["Iterative"]


@dataclass(frozen=True)
class Iterative(LinearSolver):
    """A solver that stops at ‖b − A x‖ ≤ max(rtol · ‖b‖, atol) or after `max_iter` iterations.

    Raises:
        ValueError: a tolerance is negative, or `max_iter` is not positive.
    """

    rtol: float = 1e-6
    atol: float = 0.0
    max_iter: int = 100

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, but got {value}.")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, but got {self.max_iter}.")

    def _goal(self, size: float) -> float:
        """Return the residual to reach, relative to ‖b‖ = `size`."""
        return max(self.rtol, self.atol / size)
