"""An inexact hypergradient with its error bound, and the goal-oriented estimate of its error."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.inexact.adjoint import Adjoint, solve_adjoint
from bilevel.inexact.bounds import hypergradient_bound, value_bounds
from bilevel.inexact.constants import BOUND, VALUE, Constants, Smoothness
from bilevel.inexact.level import Level, Outer, Point
from bilevel.inexact.solvers import LowerSolver, Solved
from hypergrad import Status

__all__ = ["InexactHypergradient", "Tools", "estimate_error", "inexact_hypergradient"]

ESTIMATE_FACTOR = 1.25
"""Safety factor of the goal-oriented estimate."""


@dataclass(frozen=True)
class Tools:
    """What every inexact method is made of.

    Attributes:
        level: the losses on this step's batches.
        solver: of the lower level.
        smoothness: constants.
        lower_cap: most gradients of one lower-level solve.
        adjoint_cap: most products of one adjoint solve.
        damping: added to the diagonal of the adjoint systems.
    """

    level: Level
    solver: LowerSolver
    smoothness: Smoothness
    lower_cap: int
    adjoint_cap: int
    damping: float = 0.0

    def adjoint(self, point: Point, b: Tensor, target: Tensor | float, q: Tensor | None) -> Adjoint:
        """Solve (H + damping · I) q = b to residuals of `target`, from q."""
        return solve_adjoint(lambda v: self.product(point, v), b, target, q, self.adjoint_cap)

    def product(self, point: Point, v: Tensor) -> Tensor:
        """Return (H + damping · I) v."""
        hv = point.hvp(v)
        return torch.add(hv, v, alpha=self.damping) if self.damping else hv


@dataclass(frozen=True)
class InexactHypergradient:
    """z ≈ ∇f(θ), and everything known about it.

    Attributes:
        x: x̃, shape (m, n).
        z: shape (d,).
        q: the adjoint (m, n).
        value: g(x̃), the mean over samples.
        lower: lower bound on f(θ).
        upper: upper bound on f(θ).
        omega: bound ω on ‖z - ∇f(θ)‖; None where it was not asked for.
        eps: distances certified by the residuals that were reached, (m,).
        delta: residuals of the adjoint systems, (m,).
        solve_status: of the lower level.
        adjoint: of the adjoint systems.
        constants: that the bounds were computed with.
        point: the linearization of h at x̃.
        outer: the outer loss at x̃.
    """

    x: Tensor
    z: Tensor
    q: Tensor
    value: float
    lower: float
    upper: float
    omega: float | None
    eps: Tensor
    delta: Tensor
    solve_status: Status
    adjoint: Adjoint
    constants: Constants
    point: Point
    outer: Outer

    @property
    def norm(self) -> float:
        """‖z‖₂."""
        return float(self.z.double().norm())

    @property
    def at_floor(self) -> bool:
        """Whether rounding stopped the lower level or the adjoint."""
        return Status.STALLED in (self.solve_status, self.adjoint.status)


def inexact_hypergradient(
    tools: Tools,
    x: Tensor,
    theta: Tensor,
    eps: float,
    delta: float,
    memory: Mapping[str, Any],
    q: Tensor | None = None,
    needed: Collection[str] = VALUE,
) -> tuple[InexactHypergradient, dict[str, Any]]:
    """Solve the lower level to ε and the adjoint system to δ; return z and what bounds its error.

    Where a solver ends early, the bounds are those of the residual that it reached.

    Args:
        tools: losses, solver, constants.
        x: where the lower level starts (m, n).
        theta: (d,).
        eps: distance to reach.
        delta: residual of the adjoint system to reach.
        memory: of the constants; {} at first.
        q: where the adjoint starts.
        needed: `BOUND` to compute ω, else `VALUE`.

    Raises:
        FloatingPointError: a loss, a derivative or a constant is not finite.
        NotStronglyConvexError: the inner loss has no positive μ.
        ValueError: a hyperparameter enters neither loss.
    """
    level = tools.level
    constants, memory = tools.smoothness.at(level, x, theta, memory)
    solved = tools.solver.solve(level, x, theta, constants, eps, tools.lower_cap)
    outer = level.outer(solved.x, theta)
    point = level.linearize(solved.x, theta)
    adjoint = tools.adjoint(point, outer.gradient, delta, q)
    z = outer.direct - point.cross(adjoint.q) / level.samples
    if not bool(torch.isfinite(z).all()):
        raise FloatingPointError("the hypergradient is not finite.")
    lost = [name for name in level.chart.names if name not in level.reached]
    if lost:
        raise ValueError(
            f"hparams[{lost[0]!r}] enters neither the inner nor the outer loss; a hyperparameter "
            "of the optimizer, such as a learning rate, needs Unrolled."
        )
    if set(needed) - VALUE:
        constants, memory = tools.smoothness.at(level, solved.x, theta, memory, needed, point)
    reached, size = distances(solved, constants), outer.gradient.norm(dim=1)
    lower, upper = value_bounds(constants, reached, outer.values, size)
    omega = None
    if set(needed) >= BOUND:
        omega = hypergradient_bound(constants, reached, adjoint.residual, size)
    found = InexactHypergradient(
        x=solved.x,
        z=z,
        q=adjoint.q,
        value=float(outer.values.mean()),
        lower=lower,
        upper=upper,
        omega=omega,
        eps=reached,
        delta=adjoint.residual,
        solve_status=solved.status,
        adjoint=adjoint,
        constants=constants,
        point=point,
        outer=outer,
    )
    return found, memory


def distances(solved: Solved, constants: Constants) -> Tensor:
    """Return ‖∇ₓhᵢ‖/μᵢ ≥ ‖x̃ᵢ - x̂ᵢ‖, shape (m,)."""
    return solved.residual / constants.mu


def estimate_error(
    tools: Tools, found: InexactHypergradient, theta: Tensor, rtol: float = 0.1
) -> float:
    """Return an estimate of ‖z - ∇f(θ)‖, not a bound: the error to first order, times 1.25.

    With e = H⁻¹∇ₓh ≈ x̃ - x̂ and the adjoint residual r = ∇ₓg - Hq,

        z - ∇f ≈ JᵀH⁻¹ (r - ∇²ₓₓg e + (DH[e]) q) - (DJ[e])ᵀ q,

    goal-oriented: what does not reach θ does not count.  On quadratics the terms in DH and DJ
    vanish.  The direct part of the outer loss is left out, and so is what damping does to z.

    Args:
        tools: losses.
        found: the hypergradient.
        theta: (d,).
        rtol: relative residual of the two linear systems.
    """
    level, point = tools.level, found.point
    size = point.gradient.norm(dim=1)
    away = tools.adjoint(point, point.gradient, rtol * size, None)
    in_x, in_theta = point.third(away.q, found.q)
    r = found.outer.gradient - tools.product(point, found.q)
    b = r - level.outer_hvp(found.x, theta)(away.q) + in_x
    pulled = tools.adjoint(point, b, rtol * b.norm(dim=1), None)
    error = (point.cross(pulled.q) - in_theta) / level.samples
    return ESTIMATE_FACTOR * float(error.double().norm())
