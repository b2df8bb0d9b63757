"""Generalized minimal residuals for systems without symmetry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.linear.iterative import Iterative
from hypergrad.linear.solution import Products, Solution, finite, norm, start
from hypergrad.status import Status

__all__ = ["GMRES"]


@dataclass(frozen=True)
class GMRES(Iterative):
    """Restarted generalized minimal residuals for A x = b, A any invertible matrix.

    For the maps that `CG` must not be given: fixed points, momentum, proximal steps, losses
    with stop-gradients.  Each iterate of a cycle has the smallest ‖b − A x‖ of its Krylov
    space; the basis is orthogonalized twice.  The residual is computed anew after each cycle.

    Statuses: CONVERGED; MAX_ITER; STALLED (a cycle no longer reduces the residual: a longer one
    might); BREAKDOWN (the Krylov space is exhausted and A is singular on it).

    Attributes:
        rtol: see `Iterative`.
        atol: see `Iterative`.
        max_iter: products in all cycles; a warm start and the check after a cycle add one.
        restart: iterations of a cycle; as many vectors are kept.

    Raises:
        ValueError: `restart` is not positive, or see `Iterative`.

    Source: Saad and Schultz 1986, algorithm 4.
    """

    restart: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart < 1:
            raise ValueError(f"restart must be at least 1, but got {self.restart}.")

    def _solve(self, b: Tensor, x0: Tensor | None, size: float, shared: None) -> Products[Solution]:
        target, left = self._goal(size), self.max_iter
        x, r = yield from start(b, x0)
        best = x, norm(r)
        status: Status | None = Status.CONVERGED if best[1] <= target else None
        while status is None:
            steps = min(left, self.restart, len(b))
            step, status, used = yield from self._cycle(r, best[1], target, steps)
            left -= used
            x = best[0] + step
            r = b - (yield x)
            true, before = finite(norm(r), "the residual"), best[1]
            best = min(best, (x, true), key=lambda found: found[1])
            if true <= target:
                status = Status.CONVERGED
            elif status is None and left < 1:
                status = Status.MAX_ITER
            elif status is None and true > (1 - 1e-6) * before:
                status = Status.STALLED
        return Solution(best[0], best[1], 0, status)

    def _cycle(
        self, r: Tensor, length: float, target: float, steps: int
    ) -> Products[tuple[Tensor, Status | None, int]]:
        """Minimize the residual over one Krylov space; the status says if A is singular on it."""
        rounding = 4 * torch.finfo(r.dtype).eps
        basis = r.new_empty(steps + 1, len(r))
        basis[0] = r / length
        # The Hessenberg matrix is made triangular, column by column, by the rotations.
        columns: list[list[float]] = []
        rotations: list[tuple[float, float]] = []
        rhs, largest, exhausted, k = [length], 0.0, False, 0
        for k in range(steps):
            v = yield basis[k]
            length = finite(norm(v), "‖Av‖")
            largest = max(largest, length)
            known = basis[: k + 1]
            first = torch.mv(known, v)
            v = torch.addmv(v, known.T, first, alpha=-1)
            second = torch.mv(known, v)
            v = torch.addmv(v, known.T, second, alpha=-1)
            column, rest = (first + second).tolist(), norm(v)
            for i, (c, s) in enumerate(rotations):
                column[i], column[i + 1] = (
                    c * column[i] + s * column[i + 1],
                    -s * column[i] + c * column[i + 1],
                )
            exhausted = rest <= rounding * length
            diagonal = math.hypot(column[k], rest)
            if diagonal <= rounding * largest:
                exhausted = True
                break
            c, s = column[k] / diagonal, rest / diagonal
            column[k] = diagonal
            columns.append(column)
            rotations.append((c, s))
            rhs[k:] = [c * rhs[k], -s * rhs[k]]
            if exhausted or abs(rhs[-1]) <= max(target, rounding):
                break
            basis[k + 1] = v / rest
        size = len(columns)
        triangle = torch.zeros(size, size, dtype=torch.float64)
        for j, column in enumerate(columns):
            triangle[: j + 1, j] = torch.tensor(column[: j + 1], dtype=torch.float64)
        # Singular values that are rounding stand for directions in which A is singular.
        rtol = torch.finfo(r.dtype).eps ** 0.75
        y = torch.linalg.pinv(triangle, rtol=rtol) @ torch.tensor(rhs[:size], dtype=torch.float64)
        singular = size < k + 1 or int(torch.linalg.matrix_rank(triangle, rtol=rtol)) < size
        status = Status.BREAKDOWN if exhausted and singular else None
        return torch.mv(basis[:size].T, y.to(r)), status, k + 1
