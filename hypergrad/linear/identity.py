"""The identity in place of the inverse: T1–T2."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hypergrad.linear.solution import LinearSolver, Products, Solution
from hypergrad.status import Status

__all__ = ["Identity"]


@dataclass(frozen=True)
class Identity(LinearSolver):
    """x = scale · b, as if A were I / scale.

    In a hypergradient: dF/dh ≈ ∂F/∂h − scale · (∂²f/∂h∂w) ∂F/∂w, which is T1–T2 where `scale`
    is the learning rate of the inner steps (Luketina et al., 2016, "Scalable gradient-based
    tuning of continuous regularization hyperparameters", eq. 6).  No product with A at all.

    Attributes:
        scale: a positive number; 1/scale should be a typical eigenvalue of A.

    Raises:
        ValueError: `scale` is not positive and finite.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive and finite, but got {self.scale}.")

    def _solve(self, b: Tensor, x0: Tensor | None, size: float, shared: None) -> Products[Solution]:
        return Solution(self.scale * b, None, 0, Status.APPROXIMATE)
        yield  # a generator that asks for no product
