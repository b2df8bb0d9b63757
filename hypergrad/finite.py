"""The finite-difference hypergradient of DARTS: one inner step, no Hessian-vector product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.flat import FlatSpace
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem, evaluate, inner_gradient
from hypergrad.randomness import RandomState
from hypergrad.status import Status
from hypergrad.tree import Leaves, Tree, hyper_leaves, trainable_leaves

__all__ = ["FiniteDifference"]


class FiniteDifferenceState(TypedDict):
    """Nothing to carry."""


@dataclass(frozen=True)
class FiniteDifference(Estimator[FiniteDifferenceState]):
    """The one-step hypergradient with its cross product by central differences (DARTS):

        w' = w − ξ ∇_w f(w, h),   v = ∂F/∂w(w', h),
        dF/dh ≈ ∂F/∂h(w', h) − ξ [∇_h f(w + εv, h) − ∇_h f(w − εv, h)] / (2ε)

    with ε = epsilon / ‖v‖.  Four gradients, whatever the size.  Biased: it is the hypergradient
    of a single inner step.  Both evaluations of the difference draw the same random numbers,
    and perturbed weights are copies.

    Attributes:
        lr: ξ, the size of the virtual inner step.
        epsilon: length of the perturbation εv.

    Source: Liu, Simonyan and Yang 2019, equations 7 and 8.
    """

    lr: float = 0.01
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"FiniteDifference: lr must be positive, but got {self.lr}.")
        if not self.epsilon > 0:
            raise ValueError(f"FiniteDifference: epsilon must be positive, but got {self.epsilon}.")

    def init(self, problem: Problem, params: Tree, hparams: Tree) -> FiniteDifferenceState:
        return {}

    def __call__(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        inner_batch: Any,
        outer_batch: Any,
        state: FiniteDifferenceState,
    ) -> tuple[Hypergradient, FiniteDifferenceState]:
        w, h = trainable_leaves(params), hyper_leaves(hparams)
        _, gradient = inner_gradient(problem, w, h, inner_batch, create_graph=False)
        ahead = _moved(w, gradient, -self.lr)
        value, v, direct = outer_gradients(problem, ahead, h, outer_batch)
        length = float(FlatSpace.of(v).pack(v).norm())
        # At v = 0 any ε gives the zero product, and still tells which hyperparameters enter f.
        epsilon = self.epsilon / length if length > 0 else self.epsilon
        indirect = self._cross_product(problem, w, h, inner_batch, v, epsilon)
        hypergradient = Hypergradient(
            value=value,
            grad=total_gradient(h, direct, indirect, " in one inner step"),
            params=w.tree(),
            residual=None,
            error_bound=None,
            n_hvp=0,
            n_grad=4,
            status=Status.APPROXIMATE,
        )
        return hypergradient, state

    def _cross_product(
        self,
        problem: Problem,
        w: Leaves,
        h: Leaves,
        batch: Any,
        v: Sequence[Tensor],
        epsilon: float,
    ) -> list[Tensor | None]:
        random = RandomState.capture(t.device for t in w.tensors)
        ahead = _hyper_gradient(problem, _moved(w, v, epsilon), h, batch)
        random.restore()
        behind = _hyper_gradient(problem, _moved(w, v, -epsilon), h, batch)
        return [
            None if a is None or b is None else (a - b) * (-self.lr / (2 * epsilon))
            for a, b in zip(ahead, behind, strict=True)
        ]


def _moved(w: Leaves, direction: Sequence[Tensor], length: float) -> Leaves:
    """Return fresh leaves at w + length · direction."""
    moved = [
        torch.add(t.detach(), d.to(t.dtype), alpha=length).requires_grad_()
        for t, d in zip(w.tensors, direction, strict=True)
    ]
    return replace(w, tensors=moved)


def _hyper_gradient(problem: Problem, w: Leaves, h: Leaves, batch: Any) -> list[Tensor | None]:
    with torch.enable_grad():
        value = evaluate(problem.inner_loss, "inner_loss", w, h, batch)
        if not value.requires_grad:
            return [None] * len(h.tensors)
        return list(torch.autograd.grad(value, h.tensors, allow_unused=True))
