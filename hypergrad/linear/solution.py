"""The linear solver contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hypergrad.status import Status

__all__ = ["LinearSolver", "Matvec", "Solution"]

Matvec = Callable[[Tensor], Tensor]
"""``v -> A v`` on vectors of shape (n,)."""


@dataclass(frozen=True)
class Solution:
    """An answer to A x = b and how good it is.

    Attributes:
        x: the best iterate found, shape (n,).
        residual: ‖A x − b‖₂ / ‖b‖₂; None where a solver does not look at it.
        n_matvec: products with A used.
        status: `Status.CONVERGED`, or why the solver stopped before.
    """

    x: Tensor
    residual: float | None
    n_matvec: int
    status: Status


class LinearSolver(ABC):
    """A way to solve A x = b.  Subclasses are frozen dataclasses and define `_solve`."""

    def solve(self, matvec: Matvec, b: Tensor, x0: Tensor | None = None) -> Solution:
        """Solve A x = b.

        Args:
            matvec: ``v -> A v``, A square.
            b: right-hand side, a floating vector of shape (n,).
            x0: where to start, such as the solution of a nearby system; zero if None.
                Solvers that do not iterate ignore it.

        Raises:
            ValueError: b is not a vector, or x0 does not have its shape.
            FloatingPointError: b, x0 or a product with A is not finite.
        """
        if b.dim() != 1 or not b.is_floating_point():
            raise ValueError(
                f"b must be a floating vector, but got shape {tuple(b.shape)} and dtype {b.dtype}."
            )
        if x0 is not None and x0.shape != b.shape:
            raise ValueError(f"x0 has shape {tuple(x0.shape)}, but b has {tuple(b.shape)}.")
        for name, vector in (("b", b), ("x0", x0)):
            if vector is not None and not bool(torch.isfinite(vector).all()):
                raise FloatingPointError(f"{name} must be finite, but has NaN or infinite entries.")
        largest = float(b.abs().max()) if b.numel() else 0.0
        if largest == 0.0:
            return Solution(torch.zeros_like(b), 0.0, 0, Status.CONVERGED)
        # In two steps, because squares of large or small entries leave the range of float32.
        scaled = b / largest
        size = largest * norm(scaled)
        found = self._solve(matvec, scaled / norm(scaled), None if x0 is None else x0 / size, size)
        return replace(found, x=size * found.x)

    @abstractmethod
    def _solve(self, matvec: Matvec, b: Tensor, x0: Tensor | None, size: float) -> Solution:
        """Solve with checked arguments and ‖b‖ = 1, so that residuals are relative.

        Args:
            matvec: see `solve`.
            b: right-hand side divided by its norm.
            x0: start divided by the same number.
            size: that number, for absolute tolerances.
        """


def norm(v: Tensor) -> float:
    """‖v‖₂ as a number."""
    return float(torch.linalg.vector_norm(v))


def start(matvec: Matvec, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Return x, its residual b − A x, and the products used, for ‖b‖ = 1.

    A start worse than zero is dropped.
    """
    if x0 is not None and bool(x0.any()):
        r = b - matvec(x0)
        if norm(r) < 1.0:
            return x0, r, 1
        return torch.zeros_like(b), b, 1
    return torch.zeros_like(b), b, 0


def finite(value: float, what: str) -> float:
    """Return `value`, or raise FloatingPointError where it is NaN or infinite."""
    if value - value != 0.0:
        raise FloatingPointError(
            f"{what} is {value}: a product with the operator is not finite, or it overflowed."
        )
    return value
