"""Trial points of an inexact line search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel.inexact.bounds import value_bounds
from bilevel.inexact.constants import NotStronglyConvexError
from bilevel.inexact.hypergradient import Tools, distances
from hypergrad import Status

__all__ = ["Outcome", "Trial", "try_point"]


@dataclass(frozen=True)
class Trial:
    """A trial point with its lower level solved.

    Attributes:
        x: x̃, shape (m, n).
        theta: shape (d,).
        lower: lower bound on f(θ).
        upper: upper bound on f(θ).
        value: g(x̃).
    """

    x: Tensor
    theta: Tensor
    lower: float
    upper: float
    value: float


@dataclass(frozen=True)
class Outcome:
    """How a line search ended.

    Attributes:
        trial: the accepted point; None where there is none.
        alpha: its step size.
        tried: trials up to it, itself included.
        waiting: whether the work of the outer step ran out before the trials did.
        stationary: whether the projected step is zero.
        hidden: whether rounding of g is as large as the decrease that the last trial could have.
    """

    trial: Trial | None = None
    alpha: float = 0.0
    tried: int = 0
    waiting: bool = False
    stationary: bool = False
    hidden: bool = False


def try_point(
    tools: Tools, x: Tensor, theta: Tensor, eps: float, memory: Mapping[str, Any]
) -> Trial | None:
    """Solve the lower level at θ to ε, from x; None where it is not finite or meets the cap."""
    level = tools.level
    try:
        constants, _ = tools.smoothness.at(level, x, theta, memory)
        solved = tools.solver.solve(level, x, theta, constants, eps, tools.lower_cap)
        if solved.status is Status.MAX_ITER:
            return None
        outer = level.outer(solved.x, theta)
    except (FloatingPointError, NotStronglyConvexError):
        return None
    norms = outer.gradient.norm(dim=1)
    reached = distances(solved, constants)
    lower, upper = value_bounds(constants, reached, outer.values, norms)
    return Trial(solved.x, theta, lower, upper, float(outer.values.mean()))
