"""The Neumann series as a linear solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hypergrad.linear.solution import LinearSolver, Products, Solution, finite, norm, start
from hypergrad.status import Status

__all__ = ["Neumann"]

RETRIES = 4
"""How often step="auto" is shortened where the residual grows."""

ROUNDING = 100
"""Residuals below this many units of rounding grow by rounding alone."""


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The truncated Neumann series x = η Σ_{i<K} (I − ηA)ⁱ b, A symmetric positive definite.

    Computed as the Richardson iteration r = b − Ax, x ← x + ηr: the same iterates for the same
    products, and the true residual of each.  It converges if 0 < η < 2/λ_max, at the rate
    1 − ηλ_min: many more products than `CG` for the same residual.

    Statuses: CONVERGED; MAX_ITER (all terms used); DIVERGED (the residual grew beyond its start,
    or tenfold).  The iterate with the smallest residual is returned.

    Attributes:
        terms: K, one product each.
        step: η, or "auto" for 1/(1.1 λ) with λ from power iterations, and from the residual where
            it grows.
        power_iterations: most products spent on λ with step="auto".
        rtol: stop early at this relative residual.

    Source: Lorraine, Vicol and Duvenaud 2020, algorithm 3.
    """

    terms: int = 20
    step: float | Literal["auto"] = "auto"
    power_iterations: int = 10
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.rtol < math.inf:
            raise ValueError(f"rtol must be finite and not negative, but got {self.rtol}.")
        if self.terms < 1:
            raise ValueError(f"terms must be at least 1, but got {self.terms}.")
        if self.step != "auto" and not (isinstance(self.step, int | float) and self.step > 0):
            raise ValueError(f"step must be positive or 'auto', but got {self.step!r}.")
        if self.power_iterations < 1:
            raise ValueError(
                f"power_iterations must be at least 1, but got {self.power_iterations}."
            )

    def _solve(self, b: Tensor, x0: Tensor | None, size: float, shared: None) -> Products[Solution]:
        step = yield from self._step(b)
        x, r = yield from start(b, x0)
        first = length = norm(r)
        best, shorter = (x, length, r), RETRIES if self.step == "auto" else 0
        for _ in range(self.terms):
            if length <= self.rtol or length > first:
                break
            x, before = torch.add(x, r, alpha=step), length
            r = b - (yield x)
            length = finite(norm(r), "the residual")
            if length < best[1]:
                best = x, length, r
            elif shorter and length > before > ROUNDING * torch.finfo(b.dtype).eps:
                # b had next to nothing along the largest eigenvalue, so that the power iteration
                # missed it.  By now the residual has: it grows by |1 − ηλ| a term.
                shorter -= 1
                step /= 1.1 * (1 + length / before)
                x, length, r = best
        status = Status.MAX_ITER
        if best[1] <= self.rtol:
            status = Status.CONVERGED
        elif length > min(first, 10 * best[1]):  # rounding alone moves it by less than that
            status = Status.DIVERGED
        return Solution(best[0], best[1], 0, status)

    def _step(self, b: Tensor) -> Products[float]:
        if self.step != "auto":
            return float(self.step)
        # Started from b: its components are the ones that the series has to damp.  ‖Av‖ of the
        # normalized iterates never decreases, so that one without growth is near its limit.
        v, largest = b, 0.0
        for _ in range(self.power_iterations):
            av = yield v
            previous, largest = largest, finite(norm(av), "‖Av‖")
            if largest == 0.0:
                return 1.0
            if largest < 1.01 * previous:
                break
            v = av / largest
        return 1 / (1.1 * largest)
