"""Lower-level solvers: they stop at a certified distance, ‖∇ₓh(x)‖ ≤ ε μ  ⇒  ‖x - x̂‖ ≤ ε."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.inexact.constants import Constants
from bilevel.inexact.level import Level, Point
from hypergrad import Status

__all__ = ["FISTA", "LBFGS", "GradientDescent", "LowerSolver", "NewtonCG", "Solved"]


@dataclass(frozen=True)
class Solved:
    """An approximate lower-level solution.

    Attributes:
        x: shape (m, n).
        residual: ‖∇ₓhᵢ‖₂ at x, shape (m,).
        status: CONVERGED, MAX_ITER, or STALLED where rounding stopped the residual.
    """

    x: Tensor
    residual: Tensor
    status: Status


class LowerSolver(ABC):
    """Minimizes h(·, θ) for all samples.  Subclasses are frozen dataclasses."""

    @abstractmethod
    def solve(
        self, level: Level, x: Tensor, theta: Tensor, constants: Constants, eps: float, cap: int
    ) -> Solved:
        """Return x with ‖∇ₓhᵢ(x)‖ ≤ ε μᵢ for every sample.

        Args:
            level: the losses; counts one step for each gradient.
            x: where to start (m, n).
            theta: (d,).
            constants: μ and L at θ.
            eps: distance to reach.
            cap: most gradients.

        Raises:
            FloatingPointError: a loss or a gradient is not finite.
        """


@dataclass(frozen=True)
class FISTA(LowerSolver):
    """Nesterov's method for strongly convex functions, each sample at its own step 1/L.

        x⁺ = y - ∇h(y)/L,   y⁺ = x⁺ + β (x⁺ - x),   β = (1 - √(μ/L)) / (1 + √(μ/L)).

    The returned point is the y whose gradient was seen.  Source: Nesterov 2018, scheme 2.2.22.

    Attributes:
        momentum: False for plain gradient descent.
        patience: gradients without a better residual, plus 10 √(L/μ), before rounding is blamed.
    """

    momentum: bool = True
    patience: int = 50

    def solve(
        self, level: Level, x: Tensor, theta: Tensor, constants: Constants, eps: float, cap: int
    ) -> Solved:
        """See `LowerSolver.solve`."""
        goal, step = eps * constants.mu, (1 / constants.L)[:, None]
        root = (constants.mu / constants.L).sqrt()[:, None]
        beta = (1 - root) / (1 + root) if self.momentum else torch.zeros_like(root)
        kappa = float((constants.L / constants.mu).max())
        wait = self.patience + 10 * (math.sqrt(kappa) if self.momentum else kappa)
        y, last = x, x
        best_y, best, since = x, torch.full_like(goal, math.inf), 0
        for _ in range(cap):
            level.steps += 1
            _, gradient = level.slope(y, theta)
            norms = _norms(gradient)
            left = best > goal  # a row that has reached its goal stays as it is
            better = left & (norms < best)
            since = 0 if bool((left & (norms < 0.99 * best)).any()) else since + 1
            best_y = torch.where(better[:, None], y, best_y)
            best = torch.where(better, norms, best)
            if bool((best <= goal).all()):
                return Solved(best_y, best, Status.CONVERGED)
            if since > wait:
                return Solved(best_y, best, Status.STALLED)
            moved = y - step * gradient
            y, last = moved + beta * (moved - last), moved
        return Solved(best_y, best, Status.MAX_ITER)


@dataclass(frozen=True)
class GradientDescent(LowerSolver):
    """Gradient descent at step 1/L, each sample at its own."""

    def solve(
        self, level: Level, x: Tensor, theta: Tensor, constants: Constants, eps: float, cap: int
    ) -> Solved:
        """See `LowerSolver.solve`."""
        return FISTA(momentum=False).solve(level, x, theta, constants, eps, cap)


@dataclass(frozen=True)
class LBFGS(LowerSolver):
    """SciPy's L-BFGS-B on the sum of all samples: adapts to the curvature, needs no L.

    Attributes:
        history: pairs of vectors kept.
    """

    history: int = 20

    def solve(
        self, level: Level, x: Tensor, theta: Tensor, constants: Constants, eps: float, cap: int
    ) -> Solved:
        """See `LowerSolver.solve`."""
        options = {"maxcor": self.history, "gtol": 0.0, "ftol": 0.0, "maxfun": 10**9, "maxls": 50}
        return _scipy("L-BFGS-B", options, level, x, theta, eps * constants.mu, cap)


@dataclass(frozen=True)
class NewtonCG(LowerSolver):
    """SciPy's line-search Newton method with conjugate gradients, on the sum of all samples.

    For smooth well-behaved curvature, such as logistic regression.  Its Hessian-vector products
    are counted as such, and the cap bounds gradients only.
    """

    def solve(
        self, level: Level, x: Tensor, theta: Tensor, constants: Constants, eps: float, cap: int
    ) -> Solved:
        """See `LowerSolver.solve`."""
        return _scipy("Newton-CG", {"xtol": 0.0}, level, x, theta, eps * constants.mu, cap)


class _Enough(Exception):  # noqa: N818  (leaves the library's loop)
    """The goal or the cap is reached."""


def _scipy(
    method: str,
    options: dict[str, Any],
    level: Level,
    x: Tensor,
    theta: Tensor,
    goal: Tensor,
    cap: int,
) -> Solved:
    """Minimize the sum of h by a method of `scipy.optimize`, watching every sample's gradient."""
    from scipy.optimize import minimize

    best, least = Solved(x, torch.full_like(goal, math.inf), Status.STALLED), math.inf
    start = level.steps
    point: tuple[bytes, Point] | None = None

    def tensor(vector: Any) -> Tensor:
        return torch.from_numpy(vector.copy()).to(x).reshape(x.shape)

    def value_and_slope(vector: Any) -> tuple[float, Any]:
        nonlocal best, least
        if level.steps - start >= cap:
            best = Solved(best.x, best.residual, Status.MAX_ITER)
            raise _Enough
        level.steps += 1
        at = tensor(vector)
        value, gradient = level.slope(at, theta)
        norms = _norms(gradient)
        worst = float((norms / goal).max())
        if worst < least:
            best, least = Solved(at, norms, Status.STALLED), worst
        if worst <= 1.0:
            best = Solved(at, norms, Status.CONVERGED)
            raise _Enough
        return value, gradient.reshape(-1).double().cpu().numpy()

    def product(vector: Any, direction: Any) -> Any:
        nonlocal point
        key = vector.tobytes()
        if point is None or point[0] != key:
            point = key, level.linearize(tensor(vector), theta)
        return point[1].hvp(tensor(direction)).reshape(-1).double().cpu().numpy()

    hessp: dict[str, Callable[..., Any]] = {"hessp": product} if method == "Newton-CG" else {}
    first = x.reshape(-1).detach().double().cpu().numpy()
    with contextlib.suppress(_Enough):
        minimize(
            value_and_slope, first, method=method, jac=True, **hessp,
            options={**options, "maxiter": 10**9},
        )  # fmt: skip
    return best


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms
