"""Conjugate gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.linear.iterative import Iterative
from hypergrad.linear.nystrom import Nystrom
from hypergrad.linear.solution import (
    Memory,
    Products,
    Solution,
    asymmetric,
    damped,
    finite,
    norm,
    start,
)
from hypergrad.status import Status

__all__ = ["CG"]


@dataclass(frozen=True)
class CG(Iterative):
    """Conjugate gradients for (A + damping · I) x = b, A symmetric positive definite.

    Hestenes and Stiefel (1952); Nocedal and Wright, "Numerical Optimization", alg. 5.2 and 5.3.
    The returned iterate is the one with the smallest residual.  Convergence is claimed only
    on a residual computed anew from b − A x (one more product), because the recursive one
    goes to zero even where rounding stops the true one; from there the solve is restarted as
    long as that helps.  For the other statuses the residual is computed anew where rounding may
    have moved the recursive one by a tenth.

    Statuses: CONVERGED; MAX_ITER; STALLED (restarts no longer reduce the residual);
    NEGATIVE_CURVATURE (a direction with pᵀAp < 0); BREAKDOWN (pᵀAp = 0 up to rounding of
    ‖A‖ ‖p‖², so A is singular along p); NOT_SYMMETRIC (pᵀAq ≠ qᵀAp for two directions in turn).

    Attributes:
        rtol: stop at ‖b − A x‖ ≤ max(rtol · ‖b‖, atol).
        atol: see `rtol`.
        max_iter: iterations, one product each; a warm start and each check add one.
        damping: added to the diagonal of A; residuals are those of the damped system.
        preconditioner: made of products with A, and kept in `Solution.memory`.

    Raises:
        ValueError: a tolerance or the damping is negative, or `max_iter` is not positive.
    """

    damping: float = 0.0
    preconditioner: Nystrom | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"damping must be finite and not negative, but got {self.damping}.")

    def _prepare(self, like: Tensor, memory: Memory | None) -> Products[Memory | None]:
        if self.preconditioner is None:
            return None
        return (yield from self.preconditioner.update(like, memory))

    def _solve(
        self, b: Tensor, x0: Tensor | None, size: float, shared: Memory | None
    ) -> Products[Solution]:
        target = self._goal(size)
        rounding = 4 * torch.finfo(b.dtype).eps
        precondition = (lambda r: r) if shared is None else Nystrom.inverse(shared, self.damping)
        x, r = yield from start(b, x0, self.damping)
        # `best` goes by the recursive residual, `checked` by one computed from b − A x.
        best = checked = x, norm(r)
        if checked[1] <= target:
            return Solution(x, checked[1], 0, Status.CONVERGED, shared)
        status, largest = Status.MAX_ITER, 0.0
        p = z = precondition(r)
        rz = float(torch.dot(r, z))
        last: tuple[Tensor, Tensor] | None = None  # a direction and its product
        used = 0
        for used in range(1, self.max_iter + 1):
            ap = yield from damped(p, self.damping)
            curvature = finite(float(torch.dot(p, ap)), "the curvature pᵀAp")
            pp = float(torch.dot(p, p))
            # Below rounding of the largest ‖Ap‖/‖p‖ seen, the sign of pᵀAp means nothing, and
            # a step along p would be a huge move in the null space.
            largest = max(largest, norm(ap) / math.sqrt(pp))
            threshold = rounding * largest * pp
            flat = curvature <= threshold
            if flat and last is None:
                last = ap, (yield from damped(ap, self.damping))
            # At powers of two: two directions may happen to hide what the next ones show.
            looked = flat or used & (used - 1) == 0 or used == self.max_iter
            if last is not None and looked and asymmetric(*last, p, ap):
                status = Status.NOT_SYMMETRIC
                break
            if flat:
                negative = curvature < -threshold
                status = Status.NEGATIVE_CURVATURE if negative else Status.BREAKDOWN
                break
            last = p, ap
            x = torch.add(x, p, alpha=rz / curvature)
            r = torch.add(r, ap, alpha=-rz / curvature)
            length = finite(norm(r), "the residual")
            restart = length <= max(target, rounding)
            if restart:
                r = b - (yield from damped(x, self.damping))
                length = finite(norm(r), "the residual")
                if length <= target:
                    return Solution(x, length, 0, Status.CONVERGED, shared)
                stalled = length > 0.5 * checked[1]
                best = checked = min(checked, (x, length), key=lambda found: found[1])
                if stalled:
                    status = Status.STALLED
                    break
            elif length < best[1]:
                best = x, length
            z = precondition(r)
            previous, rz = rz, float(torch.dot(r, z))
            p = z if restart else torch.add(z, p, alpha=rz / previous)
        drift = rounding * used * largest * norm(best[0])
        if best is not checked and best[1] < 10 * drift:
            r = b - (yield from damped(best[0], self.damping))
            best = min(checked, (best[0], finite(norm(r), "the residual")), key=lambda f: f[1])
        return Solution(best[0], best[1], 0, status, shared)
