"""Implicit differentiation: the hypergradient at an inner solution, whatever found it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from hypergrad.compiled import implicit as compiled
from hypergrad.compiled.cg import fits
from hypergrad.compiled.session import Arguments, run
from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.linear import CG, LinearSolver, Memory, Solution
from hypergrad.operators import Curvature, Hessian, Linearization
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Loss, Problem
from hypergrad.tree import Leaves, Tree, hyper_leaves, trainable_leaves

__all__ = ["Implicit", "ImplicitState"]

ImplicitMode = Literal["off", "step", "solve"]


class ImplicitState(TypedDict):
    """Where the next call starts.

    Attributes:
        adjoint: the last solution q, shape (d,), or of each outer loss, shape (losses, d).
        solver: what the solver keeps, such as a preconditioner.
    """

    adjoint: Tensor | None
    solver: Memory | None


@dataclass(frozen=True)
class Implicit(Estimator[ImplicitState]):
    """dF/dh = ∂F/∂h − (∂²f/∂w∂h)ᵀ q  with  (∂²f/∂w²) q = ∂F/∂w, at given parameters w.

    Exact where ∂f/∂w = 0 and the system is solved exactly.  Cost: one gradient of each loss, a
    product per solver iteration, one cross product; memory does not grow with the number of
    inner steps or of hyperparameters.  Hyperparameters that change only the path of the
    training, such as a learning rate, have no implicit hypergradient.

    Attributes:
        solver: `CG`, `MINRES`, `GMRES`, `Neumann`, `Direct` or `Identity` (T1–T2).
        operator: `Hessian`, or `GGN` for networks.
        warm_start: start the solver at the last call's q.
        compile: "step" compiles the gradients and the products with the curvature, which every
            solver then calls; "solve" blocks of several CG iterations, with fewer calls between
            them.  Compiling takes 5 to 35 seconds for new shapes, so it pays in long runs of
            small problems, and is kept on disk for the next process.  A program's first result
            is compared with the eager one.  Where compiling is not possible or not right, the
            call is eager, and `Hypergradient.compiled` says why; see `hypergrad.compiled`.

    Source: Bengio 2000; Pedregosa 2016; Lorraine, Vicol and Duvenaud 2020, theorem 1.
    """

    solver: LinearSolver = field(default_factory=CG)
    operator: Curvature = field(default_factory=Hessian)
    warm_start: bool = True
    compile: ImplicitMode = "off"

    def __post_init__(self) -> None:
        if self.compile not in get_args(ImplicitMode):
            raise ValueError(
                f"Implicit compile must be one of {get_args(ImplicitMode)}, but got "
                f"{self.compile!r}."
            )
        if self.compile == "solve" and not fits(self.solver):
            raise ValueError(
                "compile='solve' needs solver=CG() without a preconditioner, but got "
                f"{self.solver}; compile='step' takes every solver."
            )

    def init(self, problem: Problem, params: Tree, hparams: Tree) -> ImplicitState:
        return {"adjoint": None, "solver": None}

    def __call__(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        inner_batch: Any,
        outer_batch: Any,
        state: ImplicitState,
    ) -> tuple[Hypergradient, ImplicitState]:
        if self.compile != "off":
            arguments = Arguments(problem, params, hparams, inner_batch, outer_batch, state)
            return run(self, compiled.implicit, compiled.judge, arguments)
        w, h = trainable_leaves(params), hyper_leaves(hparams)
        value, outer_grad, direct = outer_gradients(problem, w, h, outer_batch)
        point = self.operator.at(problem, w, h, inner_batch)
        b = point.space.pack(outer_grad)
        solution = self.solver.solve(point.matvec, b, self.start(state, b), state["solver"])
        found = _hypergradient(point, w, value, direct, solution)
        return found, {"adjoint": solution.x, "solver": solution.memory}

    def jacobian(
        self,
        problem: Problem,
        outer_losses: Sequence[Loss],
        params: Tree,
        hparams: Tree,
        inner_batch: Any,
        outer_batch: Any,
        state: ImplicitState,
        *,
        vectorize: bool = True,
    ) -> tuple[list[Hypergradient], ImplicitState]:
        """Estimate dF/dh of several outer losses at one inner solution.

        The inner loss is differentiated once, and the linear systems advance together, see
        `LinearSolver.solve_many`.

        Args:
            problem: its inner loss is used.
            outer_losses: F, one row of the Jacobian each.
            params: see `Estimator`.
            hparams: see `Estimator`.
            inner_batch: see `Estimator`.
            outer_batch: see `Estimator`; the same for each loss.
            state: from `init` or the last call with as many losses.
            vectorize: False evaluates the products of several systems one by one, for
                operations without a `torch.vmap` rule.

        Raises:
            ValueError: no outer loss, a bad problem, or a state for other losses or params.

        Returns:
            A hypergradient for each outer loss.  The products of a preconditioner are counted
            with the first, the gradients of the inner loss, which they share, with each.
        """
        if not outer_losses:
            raise ValueError("outer_losses must hold at least one loss, but is empty.")
        w, h = trainable_leaves(params), hyper_leaves(hparams)
        outer = [
            outer_gradients(replace(problem, outer_loss=loss), w, h, outer_batch)
            for loss in outer_losses
        ]
        point = self.operator.at(problem, w, h, inner_batch)
        b = torch.stack([point.space.pack(gradient) for _, gradient, _ in outer])
        start = self.start(state, b)
        solutions = self.solver.solve_many(
            point.matvec,
            list(b),
            None if start is None else list(start),
            state["solver"],
            vectorize=vectorize,
        )
        rows = [
            _hypergradient(point, w, value, direct, solution)
            for (value, _, direct), solution in zip(outer, solutions, strict=True)
        ]
        adjoint = torch.stack([solution.x for solution in solutions])
        return rows, {"adjoint": adjoint, "solver": solutions[0].memory}

    def start(self, state: ImplicitState, b: Tensor) -> Tensor | None:
        """Return where to start a solve for b, shape (d,) or (losses, d)."""
        adjoint = state["adjoint"] if self.warm_start else None
        if adjoint is not None and adjoint.shape != b.shape:
            raise ValueError(
                f"state['adjoint'] has shape {tuple(adjoint.shape)}, but the outer gradient has "
                f"{tuple(b.shape)}; call init for other params or another number of losses."
            )
        return adjoint


def _hypergradient(
    point: Linearization,
    params: Leaves,
    value: Tensor,
    direct: Sequence[Tensor | None],
    solution: Solution,
) -> Hypergradient:
    cross = point.cross(solution.x)
    grad = total_gradient(
        point.hparams,
        direct,
        [None if c is None else -c for c in cross],
        "; a hyperparameter of the optimizer, such as a learning rate, needs Unrolled",
    )
    return Hypergradient(
        value=value,
        grad=grad,
        params=params.tree(),
        residual=solution.residual,
        error_bound=None,
        n_hvp=solution.n_matvec + 1,  # the cross product costs as much
        n_grad=1 + point.n_grad,
        status=solution.status,
    )
