"""The inverse replaced by a multiple of the identity: T1–T2."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hypergrad.linear.solution import LinearSolver, Matvec, Solution
from hypergrad.status import Status

__all__ = ["Identity"]


@dataclass(frozen=True)
class Identity(LinearSolver):
    """x = scale · b: no product at all.

    With it, `Implicit` is T1–T2: dF/dh ≈ ∂F/∂h − scale · (∂²f/∂h∂w) ∂F/∂w, the hypergradient of
    one inner gradient step of size `scale`.

    Attributes:
        scale: stands for A⁻¹.

    Source: Luketina, Berglund, Greff and Raiko 2016.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"Identity: scale must be positive, but got {self.scale}.")

    def solve(self, matvec: Matvec, b: Tensor, x0: Tensor | None = None) -> Solution:
        return Solution(self.scale * b, None, 0, Status.APPROXIMATE)
