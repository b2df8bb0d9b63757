"""F2SA: the hypergradient as a difference of two first-order gradients, with a multiplier."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from hypergrad.attention import math_attention
from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.first_order import (
    check_value_function,
    devices,
    hyper_gradient,
    replayed,
    weighted_difference,
)
from hypergrad.optimizers import Optimizer, as_optimizer
from hypergrad.optimizers.base import State
from hypergrad.optimizers.flat import flatten
from hypergrad.optimizers.values import constants
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem, evaluate, inner_gradient
from hypergrad.randomness import RandomState
from hypergrad.status import Status
from hypergrad.training import Loop, check_optimizer, check_steps, detached
from hypergrad.tree import Tree, hyper_leaves, trainable_leaves

__all__ = ["F2SA", "F2SAState"]


class F2SAState(TypedDict):
    """What continues from one call to the next.

    Attributes:
        optimizer: state of the inner optimizer at z, the params; None before the first call.
        penalized: y, a flat vector; None before the first call, when y starts at the params.
        penalized_optimizer: state of the optimizer at y.
        multiplier: λ of the next call.
    """

    optimizer: State | None
    penalized: Tensor | None
    penalized_optimizer: State | None
    multiplier: float


@dataclass(frozen=True)
class F2SA(Estimator[F2SAState]):
    """The fully first-order hypergradient, from two inner sequences and a growing multiplier:

        z → argmin_w f(w, h),   y → argmin_w f(w, h) + F(w, h)/λ,
        dF/dh ≈ ∂F/∂h(y, h) + λ [∂f/∂h(y, h) − ∂f/∂h(z, h)].

    With both minimized it is the exact gradient of min_y F(y, h) + λ [f(y, h) − min_w f(w, h)],
    whose distance to dF/dh is O(1/λ).  For f = wᵀAw/2 − (Bh + b)ᵀw and F = (w − t)ᵀC(w − t)/2
    the difference is BᵀA⁻¹C(C + λA)⁻¹C(t − z).

    A call takes `steps` steps of the inner optimizer on each sequence.  z is plain training: it
    sees the outer loss only through h, and it is `Hypergradient.params`, where `value` is taken.
    y is kept in the state.  The division by λ instead of a multiplication gives both
    sequences the same curvature, so that one learning rate fits both at every λ.

    λ [...] amplifies the noise of the batches and of inexact minimization λ times.  Both
    sequences therefore see the same batches and the same random numbers, and λ grows slowly:
    by `growth` after each call.

    Cost: 3T + 3 gradients and one more value of F; memory of plain training and a second copy
    of params and optimizer state.  A weight decay inside the optimizer is no part of f: put what
    is minimized into the inner loss.

    Source: Kwon et al., A fully first-order method for stochastic bilevel optimization, ICML
    2023, algorithm 1 (there y's step size is α and α = γ/λ here).

    Attributes:
        optimizer: the inner update rule: ours, a TorchOpt transformation, or None for the rule
            that an inner learner trains with (an outer algorithm fills it in).
        steps: T ≥ 1.
        multiplier: λ of the first call, positive.
        growth: δ ≥ 0, added to λ after each call.
    """

    optimizer: Optimizer | None = None
    steps: int = 0
    multiplier: float = 1.0
    growth: float = 0.1

    def __post_init__(self) -> None:
        check_steps("F2SA", self.steps)
        object.__setattr__(self, "optimizer", as_optimizer(self.optimizer))
        if not 0 < self.multiplier < math.inf:
            raise ValueError(f"F2SA multiplier must be positive, but got {self.multiplier!r}.")
        if not 0 <= self.growth < math.inf:
            raise ValueError(f"F2SA growth must not be negative, but got {self.growth!r}.")

    def init(self, problem: Problem, params: Tree, hparams: Tree) -> F2SAState:
        return {
            "optimizer": None,
            "penalized": None,
            "penalized_optimizer": None,
            "multiplier": float(self.multiplier),
        }

    def __call__(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        inner_batch: Any,
        outer_batch: Any,
        state: F2SAState,
    ) -> tuple[Hypergradient, F2SAState]:
        """Train z from `params` and y from where the last call left it.

        Raises:
            ValueError: a hyperparameter that enters neither loss; an inner loss that is a
                `TwoViewLoss`; a state of other params; see also `train`.
            FloatingPointError: a loss, gradient or parameter is not finite.
        """
        check_value_function("F2SA", problem)
        optimizer = check_optimizer("F2SA", self.optimizer)
        leaves, hyper = trainable_leaves(params), hyper_leaves(hparams)
        h = detached(hyper)
        values = constants(optimizer.resolve(h.tree(), leaves))
        loop = Loop(problem, leaves, h, optimizer, values, inner_batch)
        multiplier = state["multiplier"]

        z, at_z = loop.start(state["optimizer"])
        y, at_y = _start(loop, z, at_z, state)
        places = devices(leaves, hyper)
        with math_attention():
            for t in range(self.steps):
                now = replace(loop, batch=loop.batch_at(t))
                random = RandomState.capture(places)
                _, z, at_z = now.step(t, z, at_z)
                with replayed(random):
                    _, grads = inner_gradient(
                        problem, now.at(y), h, now.batch, f" at penalized step {t}", False
                    )
                _, outer, _ = outer_gradients(problem, now.at(y), hyper, outer_batch)
                gradient = flatten(grads) + flatten(outer) / multiplier
                y, at_y = now.move(t, y, gradient, at_y)

            _, _, direct = outer_gradients(problem, loop.at(y), hyper, outer_batch)
            random = RandomState.capture(places)
            _, ahead = hyper_gradient(problem, loop.at(y), hyper, now.batch)
            with replayed(random):
                _, behind = hyper_gradient(problem, loop.at(z), hyper, now.batch)
            with torch.no_grad():
                value = evaluate(problem.outer_loss, "outer_loss", loop.at(z), h, outer_batch)

        hypergradient = Hypergradient(
            value=value,
            grad=total_gradient(
                hyper,
                direct,
                weighted_difference(multiplier, ahead, behind),
                "; a hyperparameter of the optimizer, such as a learning rate, needs Unrolled",
            ),
            params=loop.params(z),
            residual=None,
            error_bound=None,
            n_hvp=0,
            n_grad=3 * self.steps + 3,
            status=Status.APPROXIMATE,
        )
        return hypergradient, {
            "optimizer": at_z,
            "penalized": y,
            "penalized_optimizer": at_y,
            "multiplier": multiplier + self.growth,
        }


def _start(loop: Loop, z: Tensor, at_z: State, state: F2SAState) -> tuple[Tensor, State]:
    """Return y and its optimizer state; at the first call, those of z."""
    y, at_y = state["penalized"], state["penalized_optimizer"]
    if y is None or at_y is None:
        return z, at_z
    if y.shape != z.shape:
        raise ValueError(
            f"state['penalized'] has {y.numel()} entries, but params have {z.numel()}; "
            "call init for other params."
        )
    return y, loop.start(at_y)[1]
