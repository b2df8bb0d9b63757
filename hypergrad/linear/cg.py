"""Conjugate gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.linear.solution import LinearSolver, Matvec, Solution, finite, norm, start
from hypergrad.status import Status

__all__ = ["CG"]


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients for (A + damping · I) x = b, A symmetric positive definite.

    Hestenes and Stiefel (1952); Nocedal and Wright, "Numerical Optimization", alg. 5.2.
    The returned iterate is the one with the smallest residual.  Convergence is claimed only
    on a residual computed anew from b − A x (one more product), because the recursive one
    goes to zero even where rounding stops the true one; from there the solve is restarted as
    long as that helps.  For the other statuses the residual is the recursive one.

    Statuses: CONVERGED; MAX_ITER; STALLED (restarts no longer reduce the residual);
    NEGATIVE_CURVATURE (a direction with pᵀAp < 0); BREAKDOWN (pᵀAp = 0 up to rounding, so A
    is singular along p).

    Attributes:
        rtol: stop at ‖b − A x‖ ≤ max(rtol · ‖b‖, atol).
        atol: see `rtol`.
        max_iter: iterations, one product each.
        damping: added to the diagonal of A; residuals are those of the damped system.

    Raises:
        ValueError: a tolerance or the damping is negative, or `max_iter` is not positive.
    """

    rtol: float = 1e-6
    atol: float = 0.0
    max_iter: int = 100
    damping: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "damping"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, but got {value}.")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, but got {self.max_iter}.")

    def _solve(self, matvec: Matvec, b: Tensor, x0: Tensor | None) -> Solution:
        def product(v: Tensor) -> Tensor:
            return matvec(v) + self.damping * v if self.damping else matvec(v)

        size = norm(b)
        goal = max(self.rtol * size, self.atol)
        rounding = torch.finfo(b.dtype).eps
        x, r, used = start(product, b, x0)
        rr = finite(float(r @ r), "the squared residual")
        best, least, status = x, math.sqrt(rr), Status.MAX_ITER
        p, verified, checked = r, math.inf, (x, math.sqrt(rr))
        for iteration in range(self.max_iter + 1):
            if math.sqrt(rr) <= goal:
                r = b - product(x)
                used += 1
                true = finite(norm(r), "the residual")
                if true <= goal:
                    return Solution(x, true / size, used, Status.CONVERGED)
                # Only verified residuals count from here on: the recursive one was too small.
                if true < verified:
                    checked = x, true
                best, least = checked
                if true > 0.5 * verified:
                    status = Status.STALLED
                    break
                p, rr, verified = r, true * true, true
            if iteration == self.max_iter:
                break
            ap = product(p)
            used += 1
            curvature = finite(float(p @ ap), "the curvature")
            threshold = rounding * norm(p) * norm(ap)
            if curvature <= threshold:
                negative = curvature < -threshold
                status = Status.NEGATIVE_CURVATURE if negative else Status.BREAKDOWN
                break
            step = rr / curvature
            x = x + step * p
            r = r - step * ap
            previous, rr = rr, finite(float(r @ r), "the squared residual")
            p = r + (rr / previous) * p
            if math.sqrt(rr) < least:
                best, least = x, math.sqrt(rr)
        return Solution(best, least / size, used, status)
