"""Minimal residuals for symmetric indefinite systems."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.linear.iterative import Iterative
from hypergrad.linear.solution import (
    Products,
    Solution,
    asymmetric,
    damped,
    finite,
    norm,
    start,
)
from hypergrad.status import Status

__all__ = ["MINRES"]


@dataclass(frozen=True)
class MINRES(Iterative):
    """Minimal residuals for (A + damping · I) x = b, A symmetric, definite or not.

    Each iterate has the smallest ‖b − A x‖ of its Krylov space, so that the residual never
    grows, and where A is singular the iterates tend to a least-squares solution.  On an
    indefinite Hessian x solves the system, but it is that of a saddle point: prefer `CG`, which
    says so, where the params should be at a minimum.

    Statuses: CONVERGED, on a residual computed anew; MAX_ITER; STALLED (restarts no longer reduce
    the residual); BREAKDOWN (‖A r‖ = 0 up to rounding of ‖A‖ ‖r‖: A is singular and x a
    least-squares solution); NOT_SYMMETRIC.

    Attributes:
        rtol: see `Iterative`.
        atol: see `Iterative`.
        max_iter: iterations, one product each; a warm start and each check add one.
        damping: added to the diagonal of A; residuals are those of the damped system.

    Source: Paige and Saunders 1975; the recurrences as in Choi 2006, table 2.7.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.damping):
            raise ValueError(f"damping must be finite, but got {self.damping}.")

    def _solve(self, b: Tensor, x0: Tensor | None, size: float, shared: None) -> Products[Solution]:
        target, left = self._goal(size), self.max_iter
        x, r = yield from start(b, x0, self.damping)
        best = x, norm(r)
        if best[1] <= target:
            return Solution(x, best[1], 0, Status.CONVERGED)
        status: Status | None = None
        while status is None:
            step, status, used = yield from self._cycle(r, best[1], target, left)
            left -= used
            x = best[0] + step
            r = b - (yield from damped(x, self.damping))
            true, before = finite(norm(r), "the residual"), best[1]
            best = min(best, (x, true), key=lambda found: found[1])
            if true <= target:
                status = Status.CONVERGED
            elif status is Status.CONVERGED and true > 0.5 * before:
                status = Status.STALLED
            elif status is Status.CONVERGED:
                status = Status.MAX_ITER if left < 1 else None
        return Solution(best[0], best[1], 0, status)

    def _cycle(
        self, r: Tensor, length: float, target: float, iterations: int
    ) -> Products[tuple[Tensor, Status | None, int]]:
        """Minimize the residual from x = 0 until its recursive norm meets the target."""
        rounding, tiny = 4 * torch.finfo(r.dtype).eps, torch.finfo(r.dtype).eps ** 0.75
        v, beta = r / length, 0.0
        v_last = w = w_last = x = torch.zeros_like(r)
        av_last = x
        cosine, sine, delta_bar, epsilon, largest = -1.0, 0.0, 0.0, 0.0, 0.0
        for k in range(1, iterations + 1):
            av = yield from damped(v, self.damping)
            if k == 2 and asymmetric(v_last, av_last, v, av):
                return x, Status.NOT_SYMMETRIC, k
            alpha = finite(float(torch.dot(v, av)), "the curvature vᵀAv")
            rest = torch.add(torch.add(av, v, alpha=-alpha), v_last, alpha=-beta)
            beta_last, beta = beta, norm(rest)
            # The last rotation on the new column of the tridiagonal matrix, then a new one.
            delta = cosine * delta_bar + sine * alpha
            gamma_bar = sine * delta_bar - cosine * alpha
            epsilon_last, epsilon = epsilon, sine * beta
            delta_bar = -cosine * beta
            largest = max(largest, math.hypot(alpha, beta, beta_last))
            gamma = math.hypot(gamma_bar, beta)
            # ‖A r‖ / ‖r‖ of the iterate so far is ‖(gamma_bar, delta_bar)‖.
            if min(math.hypot(gamma_bar, delta_bar), gamma) <= tiny * largest:
                return x, Status.BREAKDOWN, k
            cosine, sine = gamma_bar / gamma, beta / gamma
            w_next = torch.add(torch.add(v, w_last, alpha=-epsilon_last), w, alpha=-delta) / gamma
            w_last, w = w, w_next
            x = torch.add(x, w, alpha=cosine * length)
            length *= sine
            if length <= max(target, rounding):
                return x, Status.CONVERGED, k
            v_last, av_last, v = v, av, rest / beta
        return x, Status.MAX_ITER, iterations
