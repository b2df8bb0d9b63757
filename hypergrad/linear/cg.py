"""Conjugate gradients with a residual it can stand by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.linear.solution import (
    LinearSolver,
    Matvec,
    Solution,
    check_tolerances,
    zero_solution,
)
from hypergrad.status import Status

__all__ = ["CG"]


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients for A + damping·I, symmetric positive definite.

    Stops when ‖b − Ax‖ ≤ max(rtol·‖b‖, atol).  The residual of the recurrence drifts from the
    true one, so convergence is claimed only after b − Ax was formed afresh (one more product);
    if it is still too large, CG restarts from there, and reports STALLED once a restart no
    longer helps.  A direction p with pᵀAp < 0 ends the solve with NEGATIVE_CURVATURE, one with
    pᵀAp = 0 with BREAKDOWN.  The iterate with the smallest residual is returned in every case.

    Attributes:
        rtol: tolerance relative to ‖b‖.
        atol: absolute tolerance.
        max_iter: most iterations, one product each; a warm start and the final check add one.
        damping: added to the diagonal; the residual is that of the damped system.

    Source: Hestenes and Stiefel 1952; Nocedal and Wright 2006, algorithm 5.2.
    """

    rtol: float = 1e-6
    atol: float = 0.0
    max_iter: int = 100
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_tolerances("CG", self.rtol, self.atol, self.max_iter)
        if not self.damping >= 0:
            raise ValueError(f"CG: damping must be non-negative, but got {self.damping}.")

    def solve(self, matvec: Matvec, b: Tensor, x0: Tensor | None = None) -> Solution:
        if (zero := zero_solution(b)) is not None:
            return zero
        run = _Run(self, matvec, b)
        run.start(x0)
        return run.iterate()


class _Run:
    """One solve: the iterate, its residual vector, and the best of both so far."""

    def __init__(self, config: CG, matvec: Matvec, b: Tensor) -> None:
        self.config, self.product, self.b = config, matvec, b
        self.b_norm = float(b.norm())
        self.target = max(config.rtol * self.b_norm, config.atol)
        self.n_matvec = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.n_matvec += 1
        product = self.product(v)
        return product + self.config.damping * v if self.config.damping else product

    def start(self, x0: Tensor | None) -> None:
        self.x, self.r = torch.zeros_like(self.b), self.b
        if x0 is not None:
            r0 = self.b - self.matvec(x0)
            if float(r0.norm()) < self.b_norm:  # a start worse than zero is not used
                self.x, self.r = x0, r0
        self.best, self.best_norm = self.x, float(self.r.norm())

    def keep_best(self, norm: float) -> None:
        if norm < self.best_norm:
            self.best, self.best_norm = self.x, norm

    def result(self, status: Status) -> Solution:
        return Solution(self.best, self.best_norm / self.b_norm, self.n_matvec, status)

    def verified(self) -> bool:
        """Form b − Ax afresh, and make it the residual; says whether it meets the target."""
        self.r = self.b - self.matvec(self.x)
        norm = float(self.r.norm())
        self.best, self.best_norm = self.x, norm
        return norm <= self.target

    def iterate(self) -> Solution:
        checked: float | None = None  # residual at the last restart
        rr = self.best_norm**2
        if self.best_norm <= self.target:
            return self.result(Status.CONVERGED)
        p = self.r
        for _ in range(self.config.max_iter):
            ap = self.matvec(p)
            pap = float(torch.dot(p, ap))
            # Rounding gives pᵀAp an error of about eps·‖p‖‖Ap‖: below it, the sign means nothing.
            noise = torch.finfo(p.dtype).eps * float(p.norm()) * float(ap.norm())
            if not pap > noise:
                curved = pap < -noise
                return self.result(Status.NEGATIVE_CURVATURE if curved else Status.BREAKDOWN)
            alpha = rr / pap
            self.x = torch.add(self.x, p, alpha=alpha)
            self.r = torch.add(self.r, ap, alpha=-alpha)
            rr_next = float(torch.dot(self.r, self.r))
            self.keep_best(rr_next**0.5)
            if rr_next**0.5 <= self.target:
                if self.verified():
                    return self.result(Status.CONVERGED)
                if checked is not None and self.best_norm > 0.5 * checked:
                    return self.result(Status.STALLED)
                checked = self.best_norm
                p, rr = self.r, self.best_norm**2
                continue
            p = torch.add(self.r, p, alpha=rr_next / rr)
            rr = rr_next
        return self.result(Status.MAX_ITER)
