"""The solution map of `Implicit`: where the gradient of the inner loss is zero, however reached."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import optree
import torch
from torch import Tensor
from torch.autograd import Function

from hypergrad.attention import math_attention
from hypergrad.first_order import replayed
from hypergrad.flat import FlatSpace
from hypergrad.implicit import Implicit, ImplicitState
from hypergrad.operators import Hessian
from hypergrad.problem import inner_gradient
from hypergrad.randomness import RandomState
from hypergrad.solution import Grads, Run, aliases, descend, direct_grads
from hypergrad.status import Status
from hypergrad.tree import Leaves, Tree, zeros_for_none

__all__ = ["ImplicitRun", "pairing"]


def pairing(params: Tree, hparams: Tree, bars: Sequence[Tensor]) -> Tensor:
    """⟨w̄, w⟩ as an outer loss: its hypergradient is (dw*/dh)ᵀ w̄."""
    trained = {id(t): t for t in optree.tree_leaves(params) if t.requires_grad}.values()
    value = sum((bar * t).sum() for bar, t in zip(bars, trained, strict=True))
    # Every hyperparameter enters, so that one without effect gets zero.
    return cast(Tensor, value + sum(0 * h.sum() for h in optree.tree_leaves(hparams)))


@dataclass
class ImplicitRun(Run):
    """w* with ∇_w f(w*, h) = 0, found by training; its pullback is −(∂²f/∂w∂h)ᵀ (∂²f/∂w²)⁻¹ w̄.

    It does not depend on w₀.  All evaluations at w* share their random draws.

    Attributes:
        method: linear solver and operator.
        steps: most training steps.
        grad_norm: train until ‖∇_w f‖₂ is at most this; None for all the steps.
        state: where the linear solver starts; a pullback puts its solution back here.
    """

    method: Implicit = field(kw_only=True)
    steps: int = field(kw_only=True)
    grad_norm: float | None = field(kw_only=True)
    state: ImplicitState = field(kw_only=True)

    def forward(self) -> list[Tensor]:
        end = descend(self, self.steps, self.grad_norm)
        self._random = RandomState.capture(self.devices)
        return end

    def pullback(self, bars: list[Tensor], end: list[Tensor]) -> tuple[Grads, Grads]:
        """By the estimator itself, with the outer loss `pairing`."""
        nothing: Grads = [None] * len(end)
        if not self.hparams.tensors:
            return nothing, []
        method, problem, hparams = self.method, self.problem, self.hparams.tree()
        if len(optree.tree_leaves(hparams)) > len(self.hparams.tensors):
            hparams = self.hparams.tensors  # in a level above, the rest is constant
            problem = replace(problem, inner_loss=self._at_constants)
            method = replace(method, compile="off")
        params = _leaves(self.params, end).tree()
        with torch.enable_grad(), replayed(self._random), math_attention():
            found, state = method(problem, params, hparams, self.batch, bars, self.state)
        self.state.update(state)
        self._note(found.residual, found.n_hvp, found.status)
        self.report.compiled = found.compiled
        return nothing, optree.tree_leaves(found.grad)

    def _at_constants(self, params: Tree, hparams: list[Tensor], batch: Any) -> Tensor:
        return self.problem.inner_loss(params, self.hparams.rebuild(hparams), batch)

    def differentiable_pullback(
        self, bars: list[Tensor], end: list[Tensor], start: list[Tensor], hyper: list[Tensor]
    ) -> tuple[Grads, Grads]:
        """The same formula in differentiable parts: the linear solve is a node of its own.

        Raises:
            ValueError: the operator is not the Hessian.
        """
        if not isinstance(self.method.operator, Hessian):
            raise ValueError(
                "a derivative of an implicit hypergradient (create_graph=True, or a level above) "
                f"needs operator=Hessian(), but got {self.method.operator!r}."
            )
        q = _solve(self, FlatSpace.of(end).pack(bars), *end, *hyper)
        gradient, _, h = self.gradient(end, hyper)
        return [None] * len(end), direct_grads(gradient, h.tensors, -q, create_graph=True)

    def solve(self, b: Tensor, end: Sequence[Tensor], hyper: Sequence[Tensor]) -> Tensor:
        """Return (∂²f/∂w²)⁻¹ b at (w*, h), without a graph."""
        w, h = _leaves(self.params, end), _leaves(self.hparams, hyper)
        with replayed(self._random), math_attention():
            with torch.enable_grad():
                point = self.method.operator.at(self.problem, w, h, self.batch)
            found = self.method.solver.solve(point.matvec, b.detach())
        self._note(found.residual, found.n_matvec + 1, found.status)
        return found.x

    def gradient(
        self, end: Sequence[Tensor], hyper: Sequence[Tensor]
    ) -> tuple[Tensor, Leaves, Leaves]:
        """Return ∇_w f as a differentiable vector, and the leaves that it is a function of."""
        w, h = aliases(self.params, end), aliases(self.hparams, hyper)
        with replayed(self._random):
            _, grads = inner_gradient(self.problem, w, h, self.batch)
        with torch.enable_grad():
            return FlatSpace.of(end).pack(grads), w, h

    def _note(self, residual: float | None, n_hvp: int, status: Status) -> None:
        report = self.report
        report.residual, report.n_hvp, report.status = residual, n_hvp, status
        if not status.ok and status not in (Status.MAX_ITER, Status.STALLED):
            warnings.warn(
                f"implicit hypergradient: {status} (relative residual {residual}).",
                RuntimeWarning,
                stacklevel=2,
            )


class _Solve(Function):
    """q = A(θ)⁻¹ b, A symmetric.  Adjoint: b̄ = λ = A⁻¹q̄ and θ̄ = −∂⟨λ, A(θ)q⟩/∂θ, θ = (w*, h)."""

    @staticmethod
    def forward(ctx: Any, run: ImplicitRun, b: Tensor, *theta: Tensor) -> Tensor:
        split = len(run.params.tensors)
        q = run.solve(b, theta[:split], theta[split:])
        ctx.run = run
        ctx.save_for_backward(q, *theta)
        return q

    @staticmethod
    def backward(ctx: Any, q_bar: Tensor) -> tuple[Any, ...]:
        run, (q, *theta) = ctx.run, ctx.saved_tensors
        adjoint = _solve(run, q_bar, *theta)
        split = len(run.params.tensors)
        gradient, w, h = run.gradient(theta[:split], theta[split:])
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            product = direct_grads(gradient, w.tensors, q, create_graph=True)
            aq = FlatSpace.of(w.tensors).pack(zeros_for_none(product, w.tensors))
        bars = direct_grads(aq, [*w.tensors, *h.tensors], -adjoint, create_graph=graph)
        return None, adjoint, *bars


_solve: Callable[..., Tensor] = _Solve.apply


def _leaves(leaves: Leaves, tensors: Sequence[Tensor]) -> Leaves:
    return replace(leaves, tensors=[t.detach().requires_grad_() for t in tensors])
