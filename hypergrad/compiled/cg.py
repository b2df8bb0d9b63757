"""Conjugate gradients in blocks of steps without branches, for compiled products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hypergrad.linear import CG, LinearSolver
from hypergrad.linear.solution import asymmetric
from hypergrad.status import Status

__all__ = ["Found", "conjugate_gradients", "fits", "steps"]

Step = Callable[[list[Tensor]], Sequence[Tensor]]

ACTIVE, BENT, SINGULAR = 1.0, 2.0, 3.0
"""How a block left: with all steps taken, or stopped (0.0: at the goal or the limit)."""


class Found(NamedTuple):
    """A point with its true residual, and what a caller computed along with it.

    Attributes:
        residual: b − A x.
        length: its norm.
        extra: anything.
    """

    residual: Tensor
    length: float
    extra: list[Tensor]


def steps(
    solver: CG,
    count: int,
    matvec: Callable[[Tensor], Tensor],
    x: Tensor,
    r: Tensor,
    p: Tensor,
    best_x: Tensor,
    numbers: Tensor,
) -> list[Tensor]:
    """Take up to `count` steps of `CG`, then nothing: a program without branches.

    Args:
        solver: its `max_iter`.
        count: products.
        matvec: ``v -> A v``.
        x: iterate.
        r: recursive residual.
        p: direction.
        best_x: iterate with the smallest recursive residual.
        numbers: rᵀr, the smallest residual, the largest ‖Ap‖/‖p‖, steps taken, how it left,
            the residual to stop at, and |pᵀAq − qᵀAp| relative to its terms for the first two
            directions.

    Returns:
        x, r, p, best_x and numbers afterwards.
    """
    rr, best, largest, used, left, reached, skew = numbers.unbind()
    rounding = 4 * torch.finfo(r.dtype).eps
    last: tuple[Tensor, Tensor] | None = None
    for i in range(count):
        ap = matvec(p)
        active = (left == ACTIVE) & (used < solver.max_iter)
        if i == 1 and last is not None:
            skew = torch.where(active, skewness(*last, p, ap), skew)
        last = p, ap
        curvature, pp = torch.dot(p, ap), torch.dot(p, p)
        steepness = (torch.dot(ap, ap) / pp).sqrt()
        largest = torch.where(active, torch.maximum(largest, steepness), largest)
        threshold = rounding * largest * pp
        moving = active & (curvature > threshold)
        alpha = torch.where(moving, rr / curvature, 0.0)
        x, r = x + alpha * p, r - alpha * ap
        previous, rr = rr, torch.dot(r, r)
        length = rr.sqrt()
        p = r + torch.where(moving, rr / previous, 0.0) * p
        done = length <= reached
        better = moving & ~done & (length < best)
        best, best_x = torch.where(better, length, best), torch.where(better, x, best_x)
        used = used + active
        stopped = torch.where(curvature < -threshold, BENT, SINGULAR)
        after = torch.where(moving, torch.where(done, 0.0, ACTIVE), stopped)
        left = torch.where(active, after, left)
    return [x, r, p, best_x, torch.stack([rr, best, largest, used, left, reached, skew])]


def skewness(p: Tensor, ap: Tensor, q: Tensor, aq: Tensor) -> Tensor:
    """Return |pᵀAq − qᵀAp| / (‖p‖‖Aq‖ + ‖q‖‖Ap‖), which is zero where A is symmetric."""
    size = p.norm() * aq.norm() + q.norm() * ap.norm()
    skew: Tensor = (torch.dot(p, aq) - torch.dot(q, ap)).abs() / size
    return skew


def fits(solver: LinearSolver) -> bool:
    """Whether a solver is one that `conjugate_gradients` stands for."""
    return type(solver) is CG and solver.preconditioner is None


def conjugate_gradients(
    solver: CG,
    block: Step,
    check: Callable[[Tensor], Found],
    b: Tensor,
    x0: Tensor | None,
    size: float,
) -> tuple[Tensor, Found, int, Status] | None:
    """Solve A x = b for ‖b‖ = 1: `CG` with the steps between two decisions in one program.

    The statuses and restarts are those of `CG`; the residual of the returned iterate is always
    computed anew, at the price of one product.

    Args:
        solver: the tolerances.
        block: `steps`, compiled: [x, r, p, best_x, numbers] -> the same.
        check: computes the true residual of a point.
        b: right-hand side divided by its norm, or zero.
        x0: start divided by the same number.
        size: that number, for absolute tolerances.

    Returns:
        x, what `check` found there, the products used before its last call and the status;
        None where a number is not finite.
    """
    goal = max(solver.rtol, solver.atol / size if size else math.inf)
    reached = max(goal, 4 * torch.finfo(b.dtype).eps)
    used, x, r, length = 0, torch.zeros_like(b), b, 1.0 if size else 0.0
    found = None
    if x0 is not None:
        used, warm = 1, check(x0)
        if warm.length < 1.0:
            x, r, length, found = x0, warm.residual, warm.length, warm
    if length <= goal:
        return x, found or check(x), used, Status.CONVERGED
    p, best_x, best, checked, taken, largest = r, x, length, length, 0.0, 0.0
    status, left = Status.MAX_ITER, ACTIVE
    numbers = b.new_tensor([length**2, best, largest, taken, ACTIVE, reached, 0.0])
    while taken < solver.max_iter:
        x, r, p, best_x, numbers = block([x, r, p, best_x, numbers])
        rr, best, largest, taken, left, _, skew = numbers.tolist()
        if not math.isfinite(rr + best + largest):
            return None
        length, found = math.sqrt(rr), None
        if skew > torch.finfo(b.dtype).eps ** 0.25:
            status = Status.NOT_SYMMETRIC
            break
        if left in (BENT, SINGULAR):
            status = Status.NEGATIVE_CURVATURE if left == BENT else Status.BREAKDOWN
            if largest > 0:
                used += 2
                if _asymmetric(check, b, r / (length * largest), largest):
                    status = Status.NOT_SYMMETRIC
            break
        if left == ACTIVE:
            continue
        used, found = used + 1, check(x)
        length = found.length
        if length <= goal:
            return x, found, used + int(taken), Status.CONVERGED
        if length < checked:
            best_x, best = x, length
        stalled = length > 0.5 * checked
        checked = min(checked, length)
        if stalled:
            status = Status.STALLED
            break
        r = p = found.residual
        numbers = b.new_tensor([length**2, best, largest, taken, ACTIVE, reached, 0.0])
    if found is None or best_x is not x:
        found = check(best_x)
    if status is Status.MAX_ITER and found.length <= goal:
        status = Status.CONVERGED
    return best_x, found, used + int(taken), status


def _asymmetric(check: Callable[[Tensor], Found], b: Tensor, u: Tensor, scale: float) -> bool:
    """Tell whether A is not symmetric from two products in the direction of u.

    Args:
        check: computes b − A x.
        b: of the size of A u.
        u: any direction.
        scale: size of A.
    """
    au = b - check(u).residual
    v = au / scale
    return asymmetric(u, au, v, b - check(v).residual)
