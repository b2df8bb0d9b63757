"""A dense solve, for small problems and as the reference of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.linear.solution import LinearSolver, Memory, Products, Solution, norm
from hypergrad.status import Status

__all__ = ["Direct"]

Factorized = Callable[[Tensor], tuple[Tensor, Status]]
"""``b -> (x, status)`` for a matrix that is factorized once."""


@dataclass(frozen=True)
class Direct(LinearSolver):
    """Form A by its products with all n unit vectors, and factorize it.

    Symmetric A is solved by Cholesky.  Where it is not definite, by its eigenvalues: the
    least-squares solution of least norm.  A that is not symmetric, as with a `TwoViewLoss`, is
    solved by LU; by its singular values where it is singular.

    Statuses: EXACT; NEGATIVE_CURVATURE (vᵀAv < 0 for some v; x solves the system all the same);
    BREAKDOWN (A is singular up to rounding; x is the least-squares solution of least norm).

    Attributes:
        max_dim: largest n accepted; A takes n² numbers.  `solve` raises a ValueError beyond it.
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

    def _prepare(self, like: Tensor, memory: Memory | None) -> Products[tuple[Tensor, Factorized]]:
        n = len(like)
        if n > self.max_dim:
            raise ValueError(
                f"Direct: {n} parameters need a dense {n}×{n} matrix; the limit is "
                f"max_dim={self.max_dim}. Use CG."
            )
        rows = []
        for part in torch.split(torch.eye(n).to(like), self.chunk):
            rows.append((yield part[0])[None] if len(part) == 1 else (yield part))
        a = torch.cat(rows).T
        if not bool(torch.isfinite(a).all()):
            raise FloatingPointError("Direct: a product with the operator is not finite.")
        symmetric = (a + a.T) / 2
        skew = torch.linalg.matrix_norm(a - symmetric)
        if float(skew) <= torch.finfo(a.dtype).eps ** 0.5 * float(torch.linalg.matrix_norm(a)):
            return a, _symmetric(symmetric)
        return a, _general(a, symmetric)

    def _solve(
        self, b: Tensor, x0: Tensor | None, size: float, shared: tuple[Tensor, Factorized]
    ) -> Products[Solution]:
        a, factorized = shared
        x, status = factorized(b)
        return Solution(x, norm(a @ x - b), 0, status)
        yield  # a generator that asks for no product


def _rounding(n: int, dtype: torch.dtype) -> float:
    """Size relative to ‖A‖ below which an eigenvalue or singular value of A is taken for 0."""
    return float(4 * max(4.0, n**0.5) * torch.finfo(dtype).eps)


def _symmetric(a: Tensor) -> Factorized:
    n = len(a)
    factor, info = torch.linalg.cholesky_ex(a)
    if int(info) != 0:
        return _eigen(a)
    # A singular matrix can pass by rounding; then a pivot is tiny or x is huge.
    pivots = factor.diagonal().square()
    largest, doubtful = float(pivots.max()), n * _rounding(n, a.dtype)
    if float(pivots.min()) <= doubtful * largest:
        return _eigen(a)

    def solve(b: Tensor) -> tuple[Tensor, Status]:
        x = torch.cholesky_solve(b[:, None], factor)[:, 0]
        return _eigen(a)(b) if norm(x) * largest * doubtful > 1.0 else (x, Status.EXACT)

    return solve


def _eigen(a: Tensor) -> Factorized:
    values, vectors = torch.linalg.eigh(a)
    floor = _rounding(len(a), a.dtype) * float(values.abs().max())
    kept = values.abs() > floor
    inverse = torch.where(kept, 1 / values, torch.zeros_like(values))
    if bool((values < -floor).any()):
        status = Status.NEGATIVE_CURVATURE
    else:
        status = Status.EXACT if bool(kept.all()) else Status.BREAKDOWN
    return lambda b: (vectors @ (inverse * (vectors.T @ b)), status)


def _general(a: Tensor, symmetric: Tensor) -> Factorized:
    rounding = _rounding(len(a), a.dtype)
    u, singular, vh = torch.linalg.svd(a)
    kept = singular > rounding * singular.max()
    if not bool(kept.all()):
        inverse = torch.where(kept, 1 / singular, torch.zeros_like(singular))
        return lambda b: (vh.T @ (inverse * (u.T @ b)), Status.BREAKDOWN)
    curvature = torch.linalg.eigvalsh(symmetric)
    negative = float(curvature.min()) < -rounding * float(singular.max())
    status = Status.NEGATIVE_CURVATURE if negative else Status.EXACT
    lu, pivots = torch.linalg.lu_factor(a)
    return lambda b: (torch.linalg.lu_solve(lu, pivots, b[:, None])[:, 0], status)
