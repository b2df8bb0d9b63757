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
    """Form A by its products with all d unit vectors, and factorize it.

    Symmetric A is solved by Cholesky.  Where it is not definite, by its eigenvalues: the
    least-squares solution of least norm.  A that is not symmetric, as with a `TwoViewLoss`, is
    solved by LU.

    Statuses: EXACT; NEGATIVE_CURVATURE (vᵀAv < 0 for some v; x solves the system all the same);
    BREAKDOWN (A is singular up to rounding; x is the least-squares solution of least norm).

    Attributes:
        max_dim: largest d accepted; A takes d² numbers.  `solve` raises a ValueError beyond it.
        chunk: products evaluated together by `torch.vmap`, which also needs the memory of as
            many; 1 evaluates one by one, for operations without a batching rule.

    Raises:
        ValueError: `max_dim` or `chunk` is not positive.
    """

    max_dim: int = 2000
    chunk: int = 64

    def __post_init__(self) -> None:
        for name in ("max_dim", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")

    def _solve(self, matvec: Matvec, b: Tensor, x0: Tensor | None, size: float) -> Solution:
        d = b.numel()
        if d > self.max_dim:
            raise ValueError(
                f"Direct: {d} parameters need a dense {d}×{d} matrix; the limit is "
                f"max_dim={self.max_dim}. Use CG."
            )
        a = self._columns(matvec, torch.eye(d, dtype=b.dtype, device=b.device)).T
        if not bool(torch.isfinite(a).all()):
            raise FloatingPointError("Direct: a product with the operator is not finite.")
        symmetric = (a + a.T) / 2
        skew = torch.linalg.matrix_norm(a - symmetric)
        if float(skew) <= torch.finfo(a.dtype).eps ** 0.5 * float(torch.linalg.matrix_norm(a)):
            x, status = _solve_symmetric(symmetric, b)
        else:
            x, status = _solve_general(a, symmetric, b)
        residual = float((a @ x - b).norm())
        return Solution(x, residual, d, status)

    def _columns(self, matvec: Matvec, basis: Tensor) -> Tensor:
        """Return the columns of A as rows."""
        if self.chunk == 1:
            return torch.stack([matvec(e) for e in basis])
        columns: Tensor = torch.vmap(matvec, chunk_size=self.chunk)(basis)
        return columns


def _rounding(d: int, dtype: torch.dtype) -> float:
    """Size relative to ‖A‖ below which an eigenvalue or singular value of A is taken for 0."""
    return float(4 * max(4.0, d**0.5) * torch.finfo(dtype).eps)


def _solve_symmetric(a: Tensor, b: Tensor) -> tuple[Tensor, Status]:
    floor = _rounding(len(b), a.dtype)
    factor, info = torch.linalg.cholesky_ex(a)
    if int(info) == 0:
        x = torch.cholesky_solve(b[:, None], factor)[:, 0]
        # A singular matrix can pass by rounding; then a pivot is tiny or x is huge.
        pivots = factor.diagonal().square()
        size, doubtful = float(pivots.max()), len(b) * floor
        huge = float(x.norm()) * size * doubtful > 1.0
        if float(pivots.min()) > doubtful * size and not huge:
            return x, Status.EXACT
    values, vectors = torch.linalg.eigh(a)
    floor *= float(values.abs().max())
    kept = values.abs() > floor
    inverse = torch.where(kept, 1 / values, torch.zeros_like(values))
    x = vectors @ (inverse * (vectors.T @ b))
    if bool((values < -floor).any()):
        return x, Status.NEGATIVE_CURVATURE
    return x, Status.EXACT if bool(kept.all()) else Status.BREAKDOWN


def _solve_general(a: Tensor, symmetric: Tensor, b: Tensor) -> tuple[Tensor, Status]:
    u, singular, vh = torch.linalg.svd(a)
    kept = singular > _rounding(len(b), a.dtype) * singular.max()
    if not bool(kept.all()):
        inverse = torch.where(kept, 1 / singular, torch.zeros_like(singular))
        return vh.T @ (inverse * (u.T @ b)), Status.BREAKDOWN
    curvature = torch.linalg.eigvalsh(symmetric)
    negative = float(curvature.min()) < -_rounding(len(b), a.dtype) * float(singular.max())
    return torch.linalg.solve(a, b), Status.NEGATIVE_CURVATURE if negative else Status.EXACT
