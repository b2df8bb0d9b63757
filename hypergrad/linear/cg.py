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
    long as that helps.  For the other statuses the residual is computed anew where rounding may
    have moved the recursive one by a tenth.

    Statuses: CONVERGED; MAX_ITER; STALLED (restarts no longer reduce the residual);
    NEGATIVE_CURVATURE (a direction with pᵀAp < 0); BREAKDOWN (pᵀAp = 0 up to rounding of
    ‖A‖ ‖p‖², so A is singular along p).

    Attributes:
        rtol: stop at ‖b − A x‖ ≤ max(rtol · ‖b‖, atol).
        atol: see `rtol`.
        max_iter: iterations, one product each; a warm start and each check add one.
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

    def _solve(self, matvec: Matvec, b: Tensor, x0: Tensor | None, size: float) -> Solution:
        def product(v: Tensor) -> Tensor:
            return matvec(v) + self.damping * v if self.damping else matvec(v)

        goal = max(self.rtol, self.atol / size)
        rounding = 4 * torch.finfo(b.dtype).eps
        x, r, used = start(product, b, x0)
        # `best` goes by the recursive residual, `checked` by one computed from b − A x.
        best = checked = x, norm(r)
        if checked[1] <= goal:
            return Solution(x, checked[1], used, Status.CONVERGED)
        status, p, rr, largest = Status.MAX_ITER, r, checked[1] ** 2, 0.0
        for _ in range(self.max_iter):
            ap = product(p)
            used += 1
            curvature = finite(float(torch.dot(p, ap)), "the curvature pᵀAp")
            pp = float(torch.dot(p, p))
            # Below rounding of the largest ‖Ap‖/‖p‖ seen, the sign of pᵀAp means nothing, and
            # a step along p would be a huge move in the null space.
            largest = max(largest, norm(ap) / math.sqrt(pp))
            threshold = rounding * largest * pp
            if curvature <= threshold:
                negative = curvature < -threshold
                status = Status.NEGATIVE_CURVATURE if negative else Status.BREAKDOWN
                break
            x = torch.add(x, p, alpha=rr / curvature)
            r = torch.add(r, ap, alpha=-rr / curvature)
            previous, rr = rr, finite(float(torch.dot(r, r)), "the squared residual")
            if math.sqrt(rr) <= max(goal, rounding):
                r = b - product(x)
                used += 1
                true = finite(norm(r), "the residual")
                if true <= goal:
                    return Solution(x, true, used, Status.CONVERGED)
                stalled = true > 0.5 * checked[1]
                best = checked = min(checked, (x, true), key=lambda found: found[1])
                if stalled:
                    status = Status.STALLED
                    break
                p, rr = r, true**2
                continue
            p = torch.add(r, p, alpha=rr / previous)
            if math.sqrt(rr) < best[1]:
                best = x, math.sqrt(rr)
        drift = rounding * used * largest * norm(best[0])
        if best is not checked and best[1] < 10 * drift:
            true = finite(norm(b - product(best[0])), "the residual")
            used += 1
            best = min(checked, (best[0], true), key=lambda found: found[1])
        return Solution(best[0], best[1], used, status)
