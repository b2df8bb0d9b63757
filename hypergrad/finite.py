"""The finite-difference hypergradient of DARTS: one inner step, no Hessian-vector product."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch

from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.first_order import check_precision, cross_difference, devices
from hypergrad.optimizers.flat import flatten, widen
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem, inner_gradient
from hypergrad.randomness import RandomState
from hypergrad.status import Status
from hypergrad.tree import Tree, hyper_leaves, trainable_leaves

__all__ = ["FiniteDifference"]


class FiniteDifferenceState(TypedDict):
    """Nothing to carry."""


@dataclass(frozen=True)
class FiniteDifference(Estimator[FiniteDifferenceState]):
    """The one-step hypergradient with its cross product by central differences (DARTS):

        w' = w − ξ ∇_w f(w, h),   v = ∂F/∂w(w', h),
        dF/dh ≈ ∂F/∂h(w', h) − ξ [∇_h f(w + εv, h) − ∇_h f(w − εv, h)] / (2ε)

    with ε = epsilon / ‖v‖.  Four gradients, whatever the size.  Biased: it is the hypergradient
    of a single inner step.  `value` is F(w', h); `params` are the given ones, as w' is only a
    look ahead.  Both evaluations of the difference draw the random numbers of the inner step
    again, and perturbed weights are copies.

    Attributes:
        lr: ξ, the size of the virtual inner step.
        epsilon: length of the perturbation εv, in the units of w.

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
        check_precision("FiniteDifference", w)
        random = RandomState.capture(devices(w, h))
        _, gradient = inner_gradient(problem, w, h, inner_batch, create_graph=False)
        moved = [
            torch.add(t.detach(), g, alpha=-self.lr).requires_grad_()
            for t, g in zip(w.tensors, gradient, strict=True)
        ]
        value, v, direct = outer_gradients(problem, replace(w, tensors=moved), h, outer_batch)
        direction = widen(flatten(v))
        cross = cross_difference(problem, w, h, inner_batch, direction, self.epsilon, random)
        indirect = [None if c is None else -self.lr * c for c in cross]
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
