"""A dense solve, for small problems and as the reference of the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.linear.solution import LinearSolver, Matvec, Solution
from hypergrad.status import Status

__all__ = ["Direct"]


@dataclass(frozen=True)
class Direct(LinearSolver):
    """Form A column by column (d products), symmetrize it, and solve by Cholesky.

    Where that fails, the least-squares solution of least norm is taken from the eigenvalues, with
    the status NEGATIVE_CURVATURE if one is negative, and BREAKDOWN if A is only singular.

    Attributes:
        max_dim: largest d accepted; A takes d² numbers.  `solve` raises a ValueError beyond it.
    """

    max_dim: int = 2000

    def _solve(self, matvec: Matvec, b: Tensor, x0: Tensor | None) -> Solution:
        d = b.numel()
        if d > self.max_dim:
            raise ValueError(
                f"Direct: {d} parameters need a dense {d}×{d} matrix; the limit is "
                f"max_dim={self.max_dim}. Use CG."
            )
        a = torch.stack([matvec(e) for e in torch.eye(d, dtype=b.dtype, device=b.device)])
        a = (a + a.T) / 2
        x, status = self._solve_dense(a, b)
        residual = float((a @ x - b).norm() / b.norm())
        return Solution(x, residual, d, status)

    def _solve_dense(self, a: Tensor, b: Tensor) -> tuple[Tensor, Status]:
        factor, info = torch.linalg.cholesky_ex(a)
        if int(info) == 0:
            return torch.cholesky_solve(b[:, None], factor)[:, 0], Status.EXACT
        eigenvalues, vectors = torch.linalg.eigh(a)
        size = float(eigenvalues.abs().max())
        rounding = a.shape[0] * torch.finfo(a.dtype).eps * size
        kept = eigenvalues.abs() > rounding
        inverse = torch.where(kept, 1 / eigenvalues, torch.zeros_like(eigenvalues))
        x = vectors @ (inverse * (vectors.T @ b))
        negative = bool((eigenvalues < -rounding).any())
        return x, Status.NEGATIVE_CURVATURE if negative else Status.BREAKDOWN
