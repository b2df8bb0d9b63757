"""BOME and PBGD: the inner minimum as a constraint q(w, h) ≤ 0 on one sequence of weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from hypergrad.attention import math_attention
from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.first_order import (
    check_value_function,
    devices,
    hyper_gradient,
    inner_gradients,
    replayed,
    weighted_difference,
)
from hypergrad.optimizers import Optimizer, as_optimizer
from hypergrad.optimizers.base import State
from hypergrad.optimizers.flat import flatten, widen
from hypergrad.optimizers.values import constants
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem, evaluate
from hypergrad.randomness import RandomState
from hypergrad.status import Status
from hypergrad.training import Loop, check_optimizer, check_steps, detached
from hypergrad.tree import Leaves, Tree, hyper_leaves, trainable_leaves, zeros_for_none

__all__ = ["BOME", "PBGD", "ValueFunctionState"]

Barrier = Literal["gradient", "value"]


class ValueFunctionState(TypedDict):
    """What continues from one call to the next, and what the last call found.

    Attributes:
        optimizer: state of the optimizer that moves w; None before the first call.
        gap: q(w, h) before the move, the inner suboptimality; None before the first call.
        multiplier: weight that ∇q had; None before the first call.
    """

    optimizer: State | None
    gap: float | None
    multiplier: float | None


@dataclass(frozen=True)
class _ValueFunction(Estimator[ValueFunctionState]):
    """One joint step in (w, h) on F and the value-function gap q; see `BOME` and `PBGD`.

    q(w, h) = f(w, h) − f(w_T, h), where w_T is what T inner steps make of w, taken as a constant:
    ∂q/∂w = ∂f/∂w(w, h) and ∂q/∂h = ∂f/∂h(w, h) − ∂f/∂h(w_T, h).
    """

    optimizer: Optimizer | None = None
    steps: int = 0
    inner_optimizer: Optimizer | None = None

    def __post_init__(self) -> None:
        check_steps(type(self).__name__, self.steps)
        object.__setattr__(self, "optimizer", as_optimizer(self.optimizer))
        object.__setattr__(self, "inner_optimizer", as_optimizer(self.inner_optimizer))

    @abstractmethod
    def _multiplier(self, gap: float, outer: Tensor, constraint: Tensor) -> float:
        """Return λ from q and the joint gradients of F and q in (w, h)."""

    @abstractmethod
    def _direction(self, outer: Tensor, inner: Tensor, multiplier: float) -> Tensor:
        """Return the gradient that moves w, from ∂F/∂w and ∂f/∂w."""

    def init(self, problem: Problem, params: Tree, hparams: Tree) -> ValueFunctionState:
        return {"optimizer": None, "gap": None, "multiplier": None}

    def __call__(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        inner_batch: Any,
        outer_batch: Any,
        state: ValueFunctionState,
    ) -> tuple[Hypergradient, ValueFunctionState]:
        """Approximate the inner minimum, and move w one step.

        Raises:
            ValueError: a hyperparameter that enters neither loss; an inner loss that is a
                `TwoViewLoss`; see also `train`.
            FloatingPointError: a loss, gradient or parameter is not finite.
        """
        name = type(self).__name__
        check_value_function(name, problem)
        optimizer = check_optimizer(name, self.optimizer)
        leaves, hyper = trainable_leaves(params), hyper_leaves(hparams)
        h = detached(hyper)
        values = constants(optimizer.resolve(h.tree(), leaves))
        loop = Loop(problem, leaves, h, optimizer, values, inner_batch)
        flat, moving = loop.start(state["optimizer"])

        with math_attention():
            solved, batch = self._solve(loop, flat)
            _, outer, direct = outer_gradients(problem, loop.at(flat), hyper, outer_batch)
            random = RandomState.capture(devices(leaves, hyper))
            loss, inner, ahead = inner_gradients(problem, loop.at(flat), hyper, batch)
            with replayed(random):
                least, behind = hyper_gradient(problem, loop.at(solved), hyper, batch)

            gap, slope = float(loss - least), weighted_difference(1.0, ahead, behind)
            multiplier = self._multiplier(
                gap, _joint(flatten(outer), direct, hyper), _joint(inner, slope, hyper)
            )
            gradient = self._direction(flatten(outer), inner, multiplier)
            flat, moving = loop.move(self.steps, flat, gradient, moving)
            with torch.no_grad():
                value = evaluate(problem.outer_loss, "outer_loss", loop.at(flat), h, outer_batch)

        hypergradient = Hypergradient(
            value=value,
            grad=total_gradient(
                hyper,
                direct,
                weighted_difference(multiplier, ahead, behind),
                "; a hyperparameter of the optimizer, such as a learning rate, needs Unrolled",
            ),
            params=loop.params(flat),
            residual=None,
            error_bound=None,
            n_hvp=0,
            n_grad=self.steps + 3,
            status=Status.APPROXIMATE,
        )
        return hypergradient, {"optimizer": moving, "gap": gap, "multiplier": multiplier}

    def _solve(self, loop: Loop, flat: Tensor) -> tuple[Tensor, Any]:
        """Return w_T and the last batch."""
        optimizer = self.inner_optimizer or loop.optimizer
        values = constants(optimizer.resolve(loop.hparams.tree(), loop.leaves))
        loop = replace(loop, optimizer=optimizer, values=values)
        state = optimizer.init(flat)
        for t in range(self.steps):
            now = replace(loop, batch=loop.batch_at(t))
            _, flat, state = now.step(t, flat, state)
        return flat, now.batch


@dataclass(frozen=True)
class BOME(_ValueFunction):
    """The dynamic barrier on the value-function constraint:

        q(w, h) = f(w, h) − f(w_T, h),   λ = max(0, (φ − ⟨∇F, ∇q⟩) / ‖∇q‖²),
        dF/dh ≈ ∂F/∂h + λ [∂f/∂h(w, h) − ∂f/∂h(w_T, h)],   w ← U(w, ∂F/∂w + λ ∂f/∂w),

    where w_T is what T inner steps make of w, a constant in ∇q, and inner products are over
    (w, h).  ∇F + λ∇q is the direction nearest to ∇F along which q decreases at rate φ ≥ η‖∇q‖²
    or η q, so that λ sets itself; λ = 0 where ∇q = 0.

    A single sequence w moves, by its own rule: it follows the outer loss as far as q allows, and
    is an inner minimum in the limit only (`state["gap"]` tells how far it is).  Until then
    `value` is lower than F(w*(h), h), and w has seen the outer data: train anew at the h found.
    `Hypergradient.params` and `value` are taken after the move, the derivative before it.
    The theory has one step size for w and h: pair it with plain gradient descent on h.

    Cost: T + 3 gradients and one more value of F; memory of plain training.

    Source: Liu et al., BOME! Bilevel optimization made easy: a simple first-order approach,
    NeurIPS 2022, algorithm 1.

    Attributes:
        optimizer: U, moves w; ours, a TorchOpt transformation, or None for the rule that an
            inner learner trains with (an outer algorithm fills it in).
        steps: T ≥ 1.
        inner_optimizer: makes w_T, from a fresh state at each call; None: the same rule as U.
        eta: η > 0.
        barrier: φ = η‖∇q‖² ("gradient") or η q ("value").
    """

    eta: float = 0.5
    barrier: Barrier = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.eta < math.inf:
            raise ValueError(f"BOME eta must be positive, but got {self.eta!r}.")
        if self.barrier not in get_args(Barrier):
            raise ValueError(
                f"BOME barrier must be one of {get_args(Barrier)}, but got {self.barrier!r}."
            )

    def _multiplier(self, gap: float, outer: Tensor, constraint: Tensor) -> float:
        square = float(constraint.square().sum())
        if square == 0:
            return 0.0
        rate = self.eta * (square if self.barrier == "gradient" else gap)
        return max(0.0, (rate - float(torch.dot(outer, constraint))) / square)

    def _direction(self, outer: Tensor, inner: Tensor, multiplier: float) -> Tensor:
        return torch.add(outer, inner, alpha=multiplier)


@dataclass(frozen=True)
class PBGD(_ValueFunction):
    """Gradient descent on the value-function penalty (V-PBGD):

        min over (w, h) of F(w, h) + γ [f(w, h) − min_w f(w, h)],
        dF/dh ≈ ∂F/∂h + γ [∂f/∂h(w, h) − ∂f/∂h(w_T, h)],   w ← U(w, ∂f/∂w + ∂F/∂w / γ),

    where w_T is what T inner steps make of w.  Stationary points are O(1/γ) from those of the
    nested problem, also where f is not convex but its gradient dominates the gap
    (Polyak–Łojasiewicz).  The direction of w is divided by γ: the step size of plain training
    fits at every γ.  That of h must shrink like 1/γ, because w follows h by one step a call;
    `F2SA`, which lets it follow by T, has no such limit.

    As with `BOME`, w has seen the outer data and `value` is lower than F(w*(h), h), here also in
    the limit; `state["gap"]` is f(w, h) − f(w_T, h).  Train anew at the h found.
    `Hypergradient.params` and `value` are taken after the move, the derivative before it.

    Cost: T + 3 gradients and one more value of F; memory of plain training.

    Source: Shen and Chen, On penalty-based bilevel gradient descent method, ICML 2023,
    algorithm 1.

    Attributes:
        optimizer: U, moves w; ours, a TorchOpt transformation, or None for the rule that an
            inner learner trains with (an outer algorithm fills it in).
        steps: T ≥ 1.
        inner_optimizer: makes w_T, from a fresh state at each call; None: the same rule as U.
        multiplier: γ > 0.
    """

    multiplier: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.multiplier < math.inf:
            raise ValueError(f"PBGD multiplier must be positive, but got {self.multiplier!r}.")

    def _multiplier(self, gap: float, outer: Tensor, constraint: Tensor) -> float:
        return float(self.multiplier)

    def _direction(self, outer: Tensor, inner: Tensor, multiplier: float) -> Tensor:
        return inner + outer / multiplier


def _joint(in_params: Tensor, in_hparams: Sequence[Tensor | None], hyper: Leaves) -> Tensor:
    """Concatenate a gradient in (w, h)."""
    parts = [in_params, *zeros_for_none(in_hparams, hyper.tensors)]
    return torch.cat([widen(part).reshape(-1) for part in parts])
