"""Conjugate gradients for the adjoint systems Hᵢqᵢ = bᵢ of all samples together.

`hypergrad.linear` solves several systems with one operator; here every sample has its own, and a
product with all of them is one double backward.  Step lengths are those of each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad import Status

__all__ = ["Adjoint", "solve_adjoint"]


@dataclass(frozen=True)
class Adjoint:
    """An approximate solution of H q = b, and how good it is.

    Attributes:
        q: shape (m, n).
        residual: ‖Hᵢqᵢ - bᵢ‖₂, shape (m,), computed anew at the returned q.
        iterations: products with H.
        status: CONVERGED, MAX_ITER, STALLED (rounding), or NEGATIVE_CURVATURE.
        curvature: smallest pᵀHp/pᵀp seen.
    """

    q: Tensor
    residual: Tensor
    iterations: int
    status: Status
    curvature: float


def solve_adjoint(
    hvp: Callable[[Tensor], Tensor],
    b: Tensor,
    target: Tensor | float,
    q0: Tensor | None = None,
    cap: int = 1000,
) -> Adjoint:
    """Solve until every residual is at most its target.

    A row with bᵢ at most its target needs no product: qᵢ = 0.  A direction of negative curvature
    stops its row at the last iterate.

    Args:
        hvp: (m, n) -> (m, n), the product with each Hᵢ.
        b: right-hand sides (m, n).
        target: of ‖Hq - b‖₂, a number or (m,).
        q0: start (m, n); rows worse than zero are dropped.
        cap: most products.

    Raises:
        FloatingPointError: a product is not finite.
    """
    goal = torch.as_tensor(target).to(b).expand(len(b))
    q, r, used = torch.zeros_like(b), b.clone(), 0
    if q0 is not None and bool((_norms(b) > goal).any()) and bool(q0.any()):
        trial = b - hvp(q0)
        used += 1
        better = (_norms(trial) < _norms(b))[:, None]
        q, r = torch.where(better, q0, q), torch.where(better, trial, r)
    best = _norms(r)
    active = best > goal
    p, rr = r.clone(), r.square().sum(1)
    curvature, negative, stalled = float("inf"), False, torch.zeros_like(active)
    while bool(active.any()) and used < cap:
        hp = hvp(p * active[:, None])
        used += 1
        pp, php = p.square().sum(1), (p * hp).sum(1)
        if not bool(torch.isfinite(php[active]).all()):
            raise FloatingPointError("a product with the Hessian of the inner loss is not finite.")
        curvature = min(curvature, float((php / pp)[active].min()))
        bad = active & (php <= 0)
        negative = negative or bool(bad.any())
        active = active & ~bad
        step = torch.where(active, rr / torch.where(active, php, 1.0), 0.0)[:, None]
        q, r = q + step * p, r - step * hp
        reached = active & (_norms(r) <= goal)
        if bool(reached.any()) and used < cap:
            # The recursive residual goes to zero even where rounding stops the true one.
            true = b - hvp(q * reached[:, None])
            used += 1
            r = torch.where(reached[:, None], true, r)
            length = _norms(r)
            worse = reached & (length > goal)
            stalled = stalled | (worse & (length > 0.5 * best))
            best = torch.where(worse, length, best)
            active = active & ~(reached & ~worse) & ~stalled
            p = torch.where(worse[:, None], torch.zeros_like(p), p)
        new = r.square().sum(1)
        p = r + torch.where(rr > 0, new / torch.where(rr > 0, rr, 1.0), 0.0)[:, None] * p
        rr = new
    left = active | (stalled & (_norms(r) > goal))
    if negative:
        status = Status.NEGATIVE_CURVATURE
    elif bool(active.any()):
        status = Status.MAX_ITER
    else:
        status = Status.STALLED if bool(left.any()) else Status.CONVERGED
    return Adjoint(q, _norms(r), used, status, curvature)


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms
