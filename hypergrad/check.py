"""`check_hypergradient`: an estimator against central differences, on the user's own problem."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optree
import torch
from torch import Tensor

from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.linear import CG
from hypergrad.operators import Hessian
from hypergrad.outer import outer_gradients
from hypergrad.problem import ModuleProblem, Problem, inner_gradient, module_problem
from hypergrad.randomness import RandomState
from hypergrad.report import Comparison, HypergradientReport
from hypergrad.tree import Leaves, Tree, hyper_leaves, trainable_leaves

__all__ = ["check_hypergradient", "solve_inner"]

Solve = Callable[[Tree, Tree], Tree]
"""``(params, hparams) -> params`` at the inner minimum."""


def check_hypergradient(
    estimator: Estimator[Any],
    problem: Problem,
    params: Tree,
    hparams: Tree,
    inner_batch: Any,
    outer_batch: Any,
    *,
    solve: Solve | None = None,
    directions: int = 2,
    eps: float = 1e-4,
    tol: float = 1e-6,
    seed: int = 0,
) -> HypergradientReport:
    """Compare an estimator with central differences of the outer loss, in float64.

    What is differenced is what the estimator claims to differentiate.  With `estimator.steps`
    inner steps of its own: h -> F(w_T(h), h), the same steps from the same params.  Without:
    h -> F(w*(h), h), the inner problem solved anew at each h, and the estimator is called at
    w*(h).  An estimator that is biased by construction (T1–T2, DARTS, truncated) fails, and the
    report shows by how much.

    Each leaf of hparams is compared along one random direction of its own, so that a wrong one
    is named, and all together along `directions` more.  Differences at two step sizes are
    combined (Richardson), and their disagreement is the noise floor.

    Args:
        estimator: to check; called with a fresh state.
        problem: its losses must be deterministic functions of their arguments and the default
            random state, which is restored before each evaluation.
        params: where the inner problem starts.
        hparams: where the hypergradient is taken.
        inner_batch: see `Estimator`.
        outer_batch: see `Estimator`.
        solve: solver of the inner problem; `solve_inner` if None.
        directions: joint random directions.
        eps: step of the differences, relative to the size of each leaf.
        tol: largest relative error that passes, beyond the noise floor.
        seed: of the directions.

    Returns:
        A report; print it, or ask `report.passed`.

    Raises:
        ValueError: `eps`, `tol` or `directions` out of range, or a bad problem.
    """
    if not (eps > 0 and tol > 0 and directions >= 0):
        raise ValueError(
            "check_hypergradient: eps and tol must be positive and directions non-negative, "
            f"but got {eps=}, {tol=}, {directions=}."
        )
    problem, params = _double_problem(problem, _double(params))
    hparams, outer_batch = _double(hparams), _double(outer_batch)
    step_batch = inner_batch
    inner_batch = (
        (lambda t: _double(step_batch(t))) if callable(inner_batch) else _double(inner_batch)
    )
    leaves = hyper_leaves(hparams)
    random = RandomState.capture(t.device for t in leaves.tensors)

    def call(w: Tree, h: Tree) -> Hypergradient:
        random.restore()
        state = estimator.init(problem, w, h)
        return estimator(problem, w, h, inner_batch, outer_batch, state)[0]

    def minimize(start: Tree, h: Tree) -> Tree:
        random.restore()
        if solve is not None:
            return solve(start, h)
        return solve_inner(problem, start, h, inner_batch)

    def outer_value(h: Tree) -> float:
        if estimator.steps:
            return float(call(params, h).value)
        w = minimize(at, h)
        random.restore()
        value, _, _ = outer_gradients(problem, trainable_leaves(w), hyper_leaves(h), outer_batch)
        return float(value)

    with random.restored_after():
        at = params if estimator.steps else minimize(params, hparams)
        estimate = call(at, hparams)
        first, again = outer_value(hparams), outer_value(hparams)
        grads = [g.double() for g in optree.tree_leaves(estimate.grad)]
        rows = [
            _compare(name, leaves, direction, grads, outer_value, first, eps)
            for name, direction in _directions(leaves, directions, seed)
        ]
        stationarity = None
        if not estimator.steps:
            random.restore()
            stationarity = _gradient_norm(problem, at, hparams, inner_batch)
    return HypergradientReport(
        estimator=repr(estimator),
        rows=tuple(rows),
        tol=tol,
        status=estimate.status,
        deterministic=first == again,
        inner_gradient=stationarity,
    )


def solve_inner(problem: Problem, params: Tree, hparams: Tree, batch: Any) -> Tree:
    """Minimize the inner loss on one batch to rounding: L-BFGS, then Newton steps with CG.

    For small smooth problems; a local minimum where the loss is not convex.
    """
    w, h = trainable_leaves(params), hyper_leaves(hparams)
    # L-BFGS writes in place, and leaves share memory with the caller's tensors.
    w = replace(w, tensors=[t.detach().clone().requires_grad_() for t in w.tensors])
    optimizer = torch.optim.LBFGS(
        w.tensors,
        max_iter=500,
        history_size=50,
        tolerance_grad=1e-6,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value, grads = inner_gradient(problem, w, h, batch, create_graph=False)
        for tensor, grad in zip(w.tensors, grads, strict=True):
            tensor.grad = grad
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return _newton(problem, w, h, batch)


def _newton(problem: Problem, w: Leaves, h: Leaves, batch: Any, steps: int = 5) -> Tree:
    """Polish a near-minimum; stops when the gradient no longer shrinks."""
    solver, best = CG(rtol=1e-8, max_iter=500), math.inf
    tensors = [t.detach().requires_grad_() for t in w.tensors]
    accepted = tensors
    for _ in range(steps + 1):
        at = Leaves(tensors, w.names, w.rebuild)
        point = Hessian().at(problem, at, h, batch)
        gradient = point.optimality.detach()
        norm = float(gradient.norm())
        if not norm < best:
            break
        best, accepted = norm, tensors
        step = point.space.unpack(solver.solve(point.matvec, gradient).x)
        tensors = [(t.detach() - s).requires_grad_() for t, s in zip(tensors, step, strict=True)]
    return w.rebuild(accepted)


def _gradient_norm(problem: Problem, params: Tree, hparams: Tree, batch: Any) -> float:
    w, h = trainable_leaves(params), hyper_leaves(hparams)
    _, grads = inner_gradient(problem, w, h, batch, create_graph=False)
    return float(torch.cat([g.reshape(-1) for g in grads]).norm())


def _double(tree: Any) -> Any:
    """Copy a tree with its floating tensors in float64; other leaves as they are."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.detach().double().clone().requires_grad_(leaf.requires_grad)
        return leaf

    return optree.tree_map(convert, tree)


def _double_problem(problem: Problem, params: Tree) -> tuple[Problem, Tree]:
    """Give a problem made from a module a float64 copy of the module: its buffers matter."""
    if not isinstance(problem, ModuleProblem):
        return problem, params
    module = copy.deepcopy(problem.module).double()
    double, _ = module_problem(module, problem.module_inner_loss, problem.module_outer_loss)
    return double, params


def _directions(leaves: Leaves, joint: int, seed: int) -> list[tuple[str, list[Tensor]]]:
    """Random directions, each leaf scaled to its own size: one a leaf, and joint ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
        size = float(leaf.detach().norm()) or math.sqrt(leaf.numel())
        return noise * (size / max(float(noise.norm()), 1e-300))

    zero = [torch.zeros_like(leaf) for leaf in leaves.tensors]
    found = []
    for i, (name, leaf) in enumerate(zip(leaves.names, leaves.tensors, strict=True)):
        found.append((name, [*zero[:i], draw(leaf), *zero[i + 1 :]]))
    for k in range(joint):
        found.append((f"all, direction {k + 1}", [draw(leaf) for leaf in leaves.tensors]))
    return found


def _compare(
    name: str,
    leaves: Leaves,
    direction: list[Tensor],
    grads: list[Tensor],
    outer_value: Callable[[Tree], float],
    at: float,
    eps: float,
) -> Comparison:
    def value(length: float) -> float:
        moved = [
            torch.add(t.detach(), d, alpha=length).requires_grad_()
            for t, d in zip(leaves.tensors, direction, strict=True)
        ]
        return outer_value(leaves.rebuild(moved))

    def difference(step: float) -> float:
        return (value(step) - value(-step)) / (2 * step)

    coarse, fine = difference(eps), difference(eps / 2)
    extrapolated = (4 * fine - coarse) / 3
    slope = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    rounding = 4 * torch.finfo(torch.float64).eps * abs(at) / eps
    scale = max(abs(extrapolated), abs(slope), rounding, 1e-300)
    return Comparison(
        name=name,
        estimate=slope,
        difference=extrapolated,
        error=abs(slope - extrapolated) / scale,
        noise=(abs(extrapolated - fine) + rounding) / scale,
    )
