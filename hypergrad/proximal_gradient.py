"""Inner problems with a non-smooth term: min_w f(w, h) + g(w, h), g known by its proximal step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypergrad.fixed_point import (
    FixedPointResult,
    check_limits,
    linearize,
    marked,
    trained_part,
)
from hypergrad.flat import FlatSpace
from hypergrad.linear.solution import norm
from hypergrad.operators import Curvature, Hessian, Linearization
from hypergrad.problem import Problem, inner_gradient
from hypergrad.status import Status
from hypergrad.tree import Leaves, Tree, hyper_leaves, trainable_leaves

__all__ = ["ProximalGradient"]

ProximalStep = Callable[[Tree, Tree, float], Tree]
"""``(params, hparams, step) -> params``: argmin_u ‖u − params‖²/2 + step · g(u, hparams)."""


@dataclass(frozen=True)
class ProximalGradient(Curvature):
    """The fixed point w = prox_{ηg}(w − η ∇f(w, h), h), a minimum of f + g, f the inner loss.

    `solve` finds it; `Implicit(GMRES(), ProximalGradient(prox))` differentiates it, also in what
    `prox` takes from hparams.  The lasso with its weight as a hyperparameter:

        >>> def prox(params, hparams, step):
        ...     return {"w": soft_threshold(params["w"], step * hparams["l1"])}

    Where prox sets weights to zero they stay zero in the derivative: the system is that of the
    active weights.  The hypergradient does not depend on η, which must be below 2 / ‖∂²f/∂w²‖
    for `solve` only.

    Attributes:
        prox: ``(params, hparams, step) -> params``, made of `soft_threshold`,
            `group_soft_threshold`, `project_box` and `project_simplex` or your own; leaves
            without a term pass as they are.
        step: η; None for 1 / ‖∂²f/∂w²‖ by power iterations where it is needed, and in `solve`
            halved where f curves more.

    Source: Beck and Teboulle 2009 (`solve`); Bertrand et al. 2020 and 2022, "Implicit
    differentiation for fast hyperparameter selection in non-smooth convex learning".
    """

    prox: ProximalStep
    step: float | None = None

    def __post_init__(self) -> None:
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"step must be positive and finite, but got {self.step}.")

    def at(self, problem: Problem, params: Leaves, hparams: Leaves, batch: Any) -> Linearization:
        """Evaluate the map once and return the products with I − ∂T/∂w.

        Raises:
            ValueError: prox returned another tree than params.
        """
        step, used = self._step(problem, params, hparams, batch)
        _, gradient = inner_gradient(problem, params, hparams, batch)
        with torch.enable_grad():
            moved = self._prox(params, params.tensors, gradient, hparams.tree(), step)
            return linearize(params, moved, hparams, n_grad=1 + used)

    def solve(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        batch: Any,
        *,
        tol: float = 1e-6,
        max_iter: int = 1000,
    ) -> FixedPointResult:
        """Minimize f + g from `params` by accelerated proximal gradient steps (FISTA).

        The momentum restarts where it points uphill (O'Donoghue and Candès 2015).  Stops at
        ‖w − T(w, h)‖₂ / η ≤ tol, the size of the gradient where there is no g.

        Raises:
            ValueError: `tol` or `max_iter` is not positive, or prox returned another tree.
        """
        check_limits(tol, max_iter)
        w, h = trainable_leaves(params), hyper_leaves(hparams)
        tree, space = h.tree(), FlatSpace.of(w.tensors)
        step, _ = self._step(problem, w, h, batch)
        values = [t.detach() for t in w.tensors]
        ahead, t, residual, status, used = values, 1.0, math.inf, Status.MAX_ITER, 0

        def gradient(at: list[Tensor]) -> tuple[float, list[Tensor]]:
            leaves = Leaves([v.detach().requires_grad_() for v in at], w.names, w.rebuild)
            value, grads = inner_gradient(problem, leaves, h, batch, create_graph=False)
            return float(value), grads

        while used < max_iter:
            used += 1
            value, grads = gradient(ahead)
            with torch.no_grad():
                moved = self._prox(w, ahead, grads, tree, step)
                change = space.pack(moved) - space.pack(ahead)
                residual = norm(change) / step
            if self.step is None and self._too_long(
                gradient, value, grads, moved, change, step, space
            ):
                step /= 2
                continue
            with torch.no_grad():
                progress = space.pack(moved) - space.pack(values)
                uphill = float(torch.dot(change, progress)) < 0
                before, t = (1.0, 1.0) if uphill else (t, (1 + math.sqrt(1 + 4 * t * t)) / 2)
                push = progress * ((before - 1) / t)
                ahead = space.unpack(space.pack(moved) + push)
            values = moved
            if residual <= tol:
                status = Status.CONVERGED
                break
            if not math.isfinite(residual):
                status = Status.DIVERGED
                break
        return FixedPointResult(marked(w, values), residual, used, status)

    def _too_long(
        self,
        gradient: Callable[[list[Tensor]], tuple[float, list[Tensor]]],
        value: float,
        grads: list[Tensor],
        moved: list[Tensor],
        change: Tensor,
        step: float,
        space: FlatSpace,
    ) -> bool:
        """Whether f at the new point is above its quadratic model with curvature 1/η."""
        there, _ = gradient(moved)
        slope = float(torch.dot(space.pack(grads), change))
        bound = value + slope + norm(change) ** 2 / (2 * step)
        return there > bound + 10 * torch.finfo(change.dtype).eps * abs(value)

    def _prox(
        self, params: Leaves, at: list[Tensor], grads: list[Tensor], hparams: Tree, step: float
    ) -> list[Tensor]:
        down = [torch.sub(w, g, alpha=step) for w, g in zip(at, grads, strict=True)]
        return trained_part(params, self.prox(params.rebuild(down), hparams, step))

    def _step(
        self, problem: Problem, params: Leaves, hparams: Leaves, batch: Any
    ) -> tuple[float, int]:
        """Return η and the gradient evaluations spent on it."""
        if self.step is not None:
            return self.step, 0
        point = Hessian().at(problem, params, hparams, batch)
        v, largest, used = point.optimality.detach(), 0.0, 1
        while used <= 10 and norm(v) > 0.0:
            v, used = point.matvec(v / norm(v)), used + 1
            previous, largest = largest, norm(v)
            if largest < 1.01 * previous:
                break
        return 1 / (1.1 * largest) if largest > 0 else 1.0, used
