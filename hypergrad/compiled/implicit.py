"""`Implicit` by compiled graphs: both gradients, products or blocks of solver steps, the sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import optree
import torch
from torch import Tensor

from hypergrad.compiled.cg import Found, conjugate_gradients, steps
from hypergrad.compiled.graph import Graph, compile_graph, trace
from hypergrad.compiled.layout import Groups, Layout, ParamsLayout, split_params, split_tree
from hypergrad.compiled.partition import Early, split
from hypergrad.compiled.report import CannotCompileError
from hypergrad.compiled.session import Arguments, Session
from hypergrad.estimator import Hypergradient
from hypergrad.flat import FlatSpace
from hypergrad.linear import CG, Direct
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem
from hypergrad.tree import Leaves, hyper_leaves, trainable_leaves

if TYPE_CHECKING:
    from hypergrad.implicit import Implicit, ImplicitState

__all__ = ["implicit"]

BLOCK = 5
"""Solver steps in one graph: compiling takes time per step, and so does calling a graph."""


@dataclass(frozen=True)
class _Program:
    """The compiled parts of a call.

    Attributes:
        start: arguments -> F, ∂F/∂w divided by its norm, the norm, ∂F/∂h where there is one, and
            what the products need.
        products: (that, v) -> A v, or for mode "solve" (that, solver state) -> solver state.
        finish: (that, x, ∂F/∂w divided by its norm, the norm, ∂F/∂h) -> the residual, its norm
            with a flag of finiteness, q, and dF/dh.
        n_grad: gradient evaluations.
    """

    start: Early
    products: Graph
    finish: Graph
    n_grad: int


class _Inputs(NamedTuple):
    """A call's arguments as tensors."""

    trained: list[Tensor]
    constant: list[Tensor]
    hyper: list[Tensor]
    inner: list[Tensor]
    outer: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [t for part in self for t in part]


class _Layouts(NamedTuple):
    """What the arguments look like; `marks` says which hparams require grad."""

    params: ParamsLayout
    hyper: Layout
    inner: Layout
    outer: Layout
    marks: tuple[bool, ...]


def implicit(
    estimator: Implicit, arguments: Arguments, session: Session
) -> tuple[Hypergradient, ImplicitState] | None:
    """Compute an implicit hypergradient by compiled programs; see `Compute`."""
    trained, constant, params = split_params(arguments.params)
    hyper, hyper_layout = split_tree(arguments.hparams, "hparams", tie=False)
    inner, inner_layout = split_tree(arguments.inner_batch, "inner_batch")
    outer, outer_layout = split_tree(arguments.outer_batch, "outer_batch")
    marks = tuple([t.requires_grad for t in optree.tree_leaves(arguments.hparams)])
    layouts = _Layouts(params, hyper_layout, inner_layout, outer_layout, marks)
    inputs = _Inputs(trained, constant, hyper, inner, outer)

    def build() -> _Program:
        trainable_leaves(arguments.params)
        hyper_leaves(arguments.hparams)
        return _build(estimator, arguments.problem, inputs, layouts)

    key = (estimator.compile, estimator.solver, estimator.operator, layouts)
    program: _Program = session.program(arguments.problem, key, build)
    with torch.no_grad():
        (value, b, size, *direct), kept = program.start(inputs.tensors)
        norm = size.item()
        if not math.isfinite(norm):
            return None
        x0 = estimator.start(arguments.state, b)

        def check(x: Tensor) -> Found:
            residual, numbers, *extra = program.finish([*kept, x, b, size, *direct])
            length, finite = numbers.tolist()
            return Found(residual, length if finite else math.nan, extra)

        if estimator.compile == "solve":
            found = conjugate_gradients(
                estimator.solver,
                lambda state: program.products([*kept, *state]),
                check,
                b,
                None if x0 is None or not norm else x0 / norm,
                norm,
            )
            if found is None:
                return None
            _, end, used, status = found
            residual: float | None = end.length
            memory = None
        else:
            solution = estimator.solver.solve(
                lambda v: program.products([*kept, v])[0], size * b, x0, arguments.state["solver"]
            )
            memory = solution.memory
            end = check(solution.x / norm if norm else solution.x)
            used, status, residual = solution.n_matvec, solution.status, solution.residual
    if not math.isfinite(end.length) or not math.isfinite(value.item()):
        return None
    q, *grads = end.extra
    hypergradient = Hypergradient(
        value=value,
        grad=hyper_layout.rebuild(grads),
        params=params.leaves([t.requires_grad_() for t in trained], constant).tree(),
        residual=residual,
        error_bound=None,
        n_hvp=used + 1,
        n_grad=program.n_grad,
        status=status,
    )
    return hypergradient, {"adjoint": q, "solver": memory}


def _build(estimator: Implicit, problem: Problem, given: _Inputs, layouts: _Layouts) -> _Program:
    solver, groups, n_grad = estimator.solver, Groups(*given), 0
    if isinstance(solver, Direct) and solver.chunk > 1:
        raise CannotCompileError("Direct evaluates products by vmap; use Direct(chunk=1)")
    if isinstance(solver, CG) and solver.preconditioner is not None:
        if estimator.compile == "solve":
            raise CannotCompileError("compile='solve' has no preconditioner; use compile='step'")
        if solver.preconditioner.chunk > 1:
            raise CannotCompileError("Nystrom evaluates products by vmap; use Nystrom(chunk=1)")
    has_direct: list[bool] = []
    has_cross: list[bool] = []

    def everything(*tensors: Tensor) -> list[Tensor]:
        """(arguments, v) -> F, b, ‖b‖, ∂F/∂h; A v, (∂²f/∂w∂h)ᵀ v, both without None."""
        nonlocal n_grad
        trained, constant, hyper, inner, outer = groups.split(tensors)
        w = layouts.params.leaves([t.detach().requires_grad_() for t in trained], constant)
        leaves = [t.detach().requires_grad_() for t in hyper]
        names = [f"hparams[{i}]" for i in range(len(hyper))]
        h = Leaves(leaves, names, layouts.hyper.rebuild)
        value, outer_grad, direct = outer_gradients(problem, w, h, layouts.outer.rebuild(outer))
        point = estimator.operator.at(problem, w, h, layouts.inner.rebuild(inner))
        n_grad = 1 + point.n_grad
        b, size = _normalize(point.space.pack(outer_grad))
        cross = point.cross(tensors[-1])
        total_gradient(h, direct, cross, "")  # raises for a hyperparameter without effect
        has_direct[:] = [t is not None for t in direct]
        has_cross[:] = [t is not None for t in cross]
        early = [value, b, size, *(t for t in direct if t is not None)]
        return [*early, point.matvec(tensors[-1]), *(t for t in cross if t is not None)]

    inputs, space = given.tensors, FlatSpace.of(given.trained)
    v = torch.cat([t.reshape(-1).to(space.dtype) for t in given.trained])
    traced = trace(everything, [*inputs, v])
    start, linear = split(traced, len(inputs), 3 + sum(has_direct))
    with torch.no_grad():
        (_, b, size, *direct), kept = start(inputs)

    def matvec(v: Tensor, kept: Sequence[Tensor]) -> Tensor:
        product: Tensor = linear(*kept, v)[0]
        if estimator.compile == "solve" and solver.damping:
            return product + solver.damping * v
        return product

    def products(*tensors: Tensor) -> list[Tensor]:
        kept_, state = tensors[: len(kept)], tensors[len(kept) :]
        if estimator.compile != "solve":
            return [matvec(state[0], kept_)]
        return steps(solver, min(BLOCK, solver.max_iter), lambda v: matvec(v, kept_), *state)

    def finish(*tensors: Tensor) -> list[Tensor]:
        kept_, (x, b, size, *direct) = tensors[: len(kept)], tensors[len(kept) :]
        residual = b - matvec(x, kept_)
        own, through = iter(direct), iter(linear(*kept_, x)[1:])
        grads = []
        for leaf, enters, crosses in zip(given.hyper, has_direct, has_cross, strict=True):
            grad = torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
            grad = grad + next(own) if enters else grad
            grads.append(grad - size * next(through) if crosses else grad)
        q = size * x
        finite = torch.stack([t.isfinite().all() for t in (q, *grads)]).all()
        length = torch.linalg.vector_norm(residual)
        return [residual, torch.stack([length, finite.to(length)]), q, *grads]

    numbers = b.new_zeros(6)
    state = [b, b, b, b, numbers] if estimator.compile == "solve" else [b]
    return _Program(
        start,
        compile_graph(trace(products, [*kept, *state])),
        compile_graph(trace(finish, [*kept, b, b, size, *direct])),
        n_grad,
    )


def _normalize(b: Tensor) -> tuple[Tensor, Tensor]:
    """Return b divided by its norm and the norm; in two steps, as `LinearSolver.solve`."""
    largest = b.abs().max()
    scaled = b / torch.where(largest > 0, largest, 1.0)
    length = torch.linalg.vector_norm(scaled)
    return scaled / torch.where(length > 0, length, 1.0), largest * length
