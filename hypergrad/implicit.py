"""Implicit differentiation: the hypergradient at an inner solution, whatever found it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from torch import Tensor

from hypergrad.compiled.session import Arguments, run
from hypergrad.compiled.implicit import implicit
from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.linear import CG, LinearSolver
from hypergrad.operators import Curvature, Hessian
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem
from hypergrad.tree import Tree, hyper_leaves, trainable_leaves

__all__ = ["Implicit", "ImplicitState"]


class ImplicitState(TypedDict):
    """Warm start of the adjoint system: the last solution q, shape (d,)."""

    adjoint: Tensor | None


@dataclass(frozen=True)
class Implicit(Estimator[ImplicitState]):
    """dF/dh = ∂F/∂h − (∂²f/∂w∂h)ᵀ q  with  (∂²f/∂w²) q = ∂F/∂w, at given parameters w.

    Exact where ∂f/∂w = 0 and the system is solved exactly.  Cost: one gradient of each loss, a
    product per solver iteration, one cross product; memory does not grow with the number of
    inner steps or of hyperparameters.  Hyperparameters that change only the path of the
    training, such as a learning rate, have no implicit hypergradient.

    Attributes:
        solver: `CG`, `Neumann`, `Direct` or `Identity` (T1–T2).
        operator: `Hessian`, or `GGN` for networks.
        warm_start: start the solver at the last call's q.

    Source: Bengio 2000; Pedregosa 2016; Lorraine, Vicol and Duvenaud 2020, theorem 1.
    """

    solver: LinearSolver = field(default_factory=CG)
    operator: Curvature = field(default_factory=Hessian)
    warm_start: bool = True
    compile: Literal["off", "step", "solve"] = "off"

    def init(self, problem: Problem, params: Tree, hparams: Tree) -> ImplicitState:
        return {"adjoint": None}

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
            return run(self, implicit, arguments)
        w, h = trainable_leaves(params), hyper_leaves(hparams)
        value, outer_grad, direct = outer_gradients(problem, w, h, outer_batch)
        point = self.operator.at(problem, w, h, inner_batch)
        b = point.space.pack(outer_grad)
        solution = self.solver.solve(point.matvec, b, self.start(state, b))
        cross = point.cross(solution.x)
        grad = total_gradient(
            h,
            direct,
            [None if c is None else -c for c in cross],
            "; a hyperparameter of the optimizer, such as a learning rate, needs Unrolled",
        )
        hypergradient = Hypergradient(
            value=value,
            grad=grad,
            params=w.tree(),
            residual=solution.residual,
            error_bound=None,
            n_hvp=solution.n_matvec + 1,  # the cross product costs as much
            n_grad=1 + point.n_grad,
            status=solution.status,
        )
        return hypergradient, {"adjoint": solution.x}

    def start(self, state: ImplicitState, b: Tensor) -> Tensor | None:
        start = state["adjoint"] if self.warm_start else None
        if start is not None and start.shape != b.shape:
            raise ValueError(
                f"state['adjoint'] has {start.numel()} entries, but params have {b.numel()}; "
                "call init for other params."
            )
        return start
