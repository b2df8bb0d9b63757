"""The linear-solver contract: A x = b on flat vectors, with a residual and a status."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.status import Status

__all__ = ["LinearSolver", "Matvec", "Solution"]

Matvec = Callable[[Tensor], Tensor]
"""v -> A v for a vector of shape (d,)."""


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        x: the best iterate, shape (d,).
        residual: ‖Ax − b‖ / ‖b‖ at `x`; None where the solver never forms it.
        n_matvec: products with A used.
        status: why it stopped.
    """

    x: Tensor
    residual: float | None
    n_matvec: int
    status: Status


class LinearSolver(ABC):
    """Solves A x = b for a symmetric A given by its products; a frozen dataclass."""

    @abstractmethod
    def solve(self, matvec: Matvec, b: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve A x = b.

        Args:
            matvec: v -> A v.
            b: right-hand side, shape (d,), finite.
            x0: where to start (a warm start); zero if None.
        """


def zero_solution(b: Tensor) -> Solution | None:
    """Return x = 0 where b = 0, which has no relative residual; else None."""
    if bool((b == 0).all()):
        return Solution(torch.zeros_like(b), 0.0, 0, Status.CONVERGED)
    return None


def check_tolerances(name: str, rtol: float, atol: float, max_iter: int) -> None:
    """Check the stopping rule of an iterative solver.

    Raises:
        ValueError: naming the argument.
    """
    if not (rtol >= 0 and atol >= 0):
        raise ValueError(
            f"{name}: rtol and atol must be non-negative, but got {rtol=} and {atol=}."
        )
    if max_iter < 1:
        raise ValueError(f"{name}: max_iter must be at least 1, but got {max_iter}.")
