"""Inner solutions that are fixed points w = T(w, h): momentum, proximal steps, equilibria."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from hypergrad.flat import FlatSpace
from hypergrad.linear.solution import norm
from hypergrad.operators import Curvature, Linearization, vector_jacobian
from hypergrad.problem import Problem
from hypergrad.status import Status
from hypergrad.tree import (
    Leaves,
    Tree,
    hyper_leaves,
    same_structure,
    trainable_leaves,
    zeros_for_none,
)

__all__ = ["FixedPoint", "FixedPointResult"]

FixedPointMap = Callable[[Tree, Tree, Any], Tree]
"""``(params, hparams, batch) -> params``: T, a tree like its first argument."""


@dataclass(frozen=True)
class FixedPointResult:
    """Where an iteration ended.

    Attributes:
        params: the last iterate, detached, marked with the `requires_grad` of the start.
        residual: ‖w − T(w, h)‖₂ of the iterate before it; divided by η for a proximal step.
        iterations: evaluations of the map.
        status: CONVERGED, MAX_ITER, or DIVERGED.
    """

    params: Tree
    residual: float
    iterations: int
    status: Status


@dataclass(frozen=True)
class FixedPoint(Curvature):
    """Stands for an inner problem w = T(w, h) in `Implicit(GMRES(), FixedPoint(T))`.

    dF/dh = ∂F/∂h + (∂T/∂h)ᵀ q  with  (I − ∂T/∂w)ᵀ q = ∂F/∂w.  The system is not symmetric as a
    rule, so that `CG` refuses it; `Neumann(step=1.0)` is the iteration q ← (∂T/∂w)ᵀ q + ∂F/∂w,
    which converges where the iteration of T does.  The inner loss of the problem is not used.

    Attributes:
        map: T, ``(params, hparams, batch) -> params``; constants of params may be anything in
            what it returns.

    Source: Christianson 1994; Bai, Kolter and Koltun 2019 (deep equilibrium models).
    """

    map: FixedPointMap

    def at(self, problem: Problem, params: Leaves, hparams: Leaves, batch: Any) -> Linearization:
        """Evaluate T once and return the products with I − ∂T/∂w.

        Raises:
            ValueError: T returned another tree than params.
        """
        with torch.enable_grad():
            moved = self.map(params.tree(), hparams.tree(), batch)
            return linearize(params, trained_part(params, moved), hparams, n_grad=1)

    def solve(
        self,
        params: Tree,
        hparams: Tree,
        batch: Any,
        *,
        tol: float = 1e-6,
        max_iter: int = 1000,
    ) -> FixedPointResult:
        """Iterate w ← T(w, h) from `params` until ‖w − T(w, h)‖₂ ≤ tol.

        Raises:
            ValueError: `tol` or `max_iter` is not positive, or T returned another tree.
        """
        w, h = trainable_leaves(params), hyper_leaves(hparams)
        check_limits(tol, max_iter)
        space, tree = FlatSpace.of(w.tensors), h.tree()
        values, first, residual = w.tensors, math.inf, math.inf
        status, used = Status.MAX_ITER, 0
        while used < max_iter and status is Status.MAX_ITER:
            used += 1
            with torch.no_grad():
                moved = trained_part(w, self.map(w.rebuild(values), tree, batch))
                residual = norm(space.pack(moved) - space.pack(values))
            first = residual if used == 1 else first
            if residual <= tol:
                values, status = moved, Status.CONVERGED
            elif residual < 1e6 * (first + tol):
                values = moved
            else:
                status = Status.DIVERGED
        return FixedPointResult(marked(w, values), residual, used, status)


def linearize(params: Leaves, moved: list[Tensor], hparams: Leaves, n_grad: int) -> Linearization:
    """Linearize the condition w − T(w, h) = 0 at a point, from T(w, h) with its graph."""
    space = FlatSpace.of(params.tensors)
    condition = space.pack(params.tensors) - space.pack(moved)

    def product(v: Tensor) -> Tensor:
        found = vector_jacobian([condition], params.tensors, [v])
        return space.pack(zeros_for_none(found, params.tensors))

    return Linearization(space, condition, product, hparams, n_grad)


def trained_part(params: Leaves, moved: Tree) -> list[Tensor]:
    """Select from a tree like params what stands where `params.tensors` stand.

    Raises:
        ValueError: it is another tree.
    """
    same_structure(moved, params.tree(), "the map's result", "params")
    slots = optree.tree_leaves(params.rebuild(list(range(len(params.tensors)))))  # type: ignore[arg-type]
    found: dict[int, Tensor] = {}
    for slot, tensor in zip(slots, optree.tree_leaves(moved), strict=True):
        if isinstance(slot, int):
            found.setdefault(slot, tensor)
    return [found[i] for i in range(len(found))]


def marked(params: Leaves, values: list[Tensor]) -> Tree:
    """Return values as new params: detached leaves, of which the trained ones require grad."""
    return params.rebuild([v.detach().clone().requires_grad_() for v in values])


def check_limits(tol: float, max_iter: int) -> None:
    """Raise ValueError where a limit of an iteration is not positive."""
    if not tol > 0:
        raise ValueError(f"tol must be positive, but got {tol}.")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, but got {max_iter}.")
