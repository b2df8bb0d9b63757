"""SAMA: a hypergradient of three gradients that knows the inner optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from hypergrad.attention import math_attention
from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.first_order import check_precision, cross_difference, devices
from hypergrad.optimizers import Optimizer, as_optimizer
from hypergrad.optimizers.base import State, vectors
from hypergrad.optimizers.flat import flatten, unflatten, widen
from hypergrad.optimizers.values import constants, tuned
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem, check_finite, inner_gradient
from hypergrad.randomness import RandomState
from hypergrad.status import Status
from hypergrad.tape import Adjoint, Tape
from hypergrad.training import Loop, check_optimizer, check_steps, detached
from hypergrad.tree import Tree, hyper_leaves, trainable_leaves

__all__ = ["SAMA", "SAMAState"]


class SAMAState(TypedDict):
    """What continues from one call to the next.

    Attributes:
        optimizer: state of the inner optimizer after the last step; None before the first call.
    """

    optimizer: State | None


@dataclass(frozen=True)
class SAMA(Estimator[SAMAState]):
    """The hypergradient of an adaptive optimizer's last step, without second derivatives:

        dF/dh ≈ ∂F/∂h − (∂²f/∂w∂h)ᵀ D v,   v = ∂F/∂w,   D = ∂u/∂g,

    where w ← w − u(g; s) is the step of the inner optimizer at the gradient g = ∇_w f.  It is the
    implicit hypergradient with two replacements: the base Jacobian ∂u/∂w is the identity, as in
    T1–T2, and the meta Jacobian goes through the update rule (algorithmic adaptation).  D is
    the optimizer's own `adjoint`: η for SGD, so that SAMA is T1–T2 times the learning rate; for
    Adam a diagonal that bounds what entries with small gradients contribute.  The cross
    product is a central difference of ∂f/∂h along D v, of length `epsilon`.

    A call takes `steps` plain steps from `params`, differentiates the last one, and takes v after
    it: the numbers are those of ``Unrolled(optimizer, steps, truncation=1)`` up to the error of
    the difference, O(epsilon²).  Hyperparameters of the optimizer (`Hyper`) therefore have the
    exact derivative of that step.

    Cost: one gradient a step, and three more; memory of plain training.  Bias: that of a single
    inner step.  It does not vanish at the inner minimum, where the direction is still useful but
    the length means little: prefer an outer optimizer that normalizes it.

    Both evaluations of the difference see the batch, the dropout masks and the BatchNorm
    statistics of the last step, and perturbed weights are copies.

    Source: Choe et al., Making scalable meta learning practical, NeurIPS 2023, section 3.

    Attributes:
        optimizer: the inner update rule: ours, a TorchOpt transformation, or None for the rule
            that an inner learner trains with (an outer algorithm fills it in).
        steps: T ≥ 1.
        epsilon: norm of the perturbation of w, in the units of w.
    """

    optimizer: Optimizer | None = None
    steps: int = 1
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        check_steps("SAMA", self.steps)
        object.__setattr__(self, "optimizer", as_optimizer(self.optimizer))
        if not self.epsilon > 0:
            raise ValueError(f"SAMA epsilon must be positive, but got {self.epsilon!r}.")

    def init(self, problem: Problem, params: Tree, hparams: Tree) -> SAMAState:
        return {"optimizer": None}

    def __call__(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        inner_batch: Any,
        outer_batch: Any,
        state: SAMAState,
    ) -> tuple[Hypergradient, SAMAState]:
        """Train from `params` and differentiate the last step.

        Raises:
            ValueError: a hyperparameter that enters neither loss nor the optimizer; params in
                bfloat16 or float16; see also `train`.
            FloatingPointError: a loss, gradient, parameter or adjoint is not finite.
        """
        optimizer = check_optimizer("SAMA", self.optimizer)
        leaves, hyper = trainable_leaves(params), hyper_leaves(hparams)
        check_precision("SAMA", leaves)
        with torch.enable_grad():
            values = optimizer.resolve(hyper.tree(), leaves)
        loop = Loop(problem, leaves, detached(hyper), optimizer, constants(values), inner_batch)

        before, inner = loop.start(state["optimizer"])
        with math_attention():
            last = self.steps - 1
            for t in range(last):
                _, before, inner = loop.step(t, before, inner)
            batch = loop.batch_at(last)
            random = RandomState.capture(devices(leaves, hyper))
            at = loop.at(before)
            _, grads = inner_gradient(
                problem, at, loop.hparams, batch, f" at step {last}", create_graph=False
            )
            grad = flatten(grads)
            flat, after = loop.move(last, before, grad, inner)
            value, v, direct = outer_gradients(problem, loop.at(flat), hyper, outer_batch)

            wide = {**inner, **{k: widen(x) for k, x in vectors(inner).items()}}
            flat_bar, grad_bar, _, value_bars = optimizer.adjoint(
                widen(before),
                widen(grad),
                wide,
                loop.values,
                widen(flatten(v)),
                {},
                list(tuned(values)),
            )
            pieces = unflatten(grad_bar, leaves.tensors)
            check_finite(pieces, leaves.names, f"the adjoint of the optimizer at step {last}")
            cross = cross_difference(problem, at, hyper, batch, grad_bar, self.epsilon, random)

        adjoint = Adjoint(Tape(loop, hyper), values, flat_bar, {}, value_bars, cross)
        hypergradient = Hypergradient(
            value=value,
            grad=total_gradient(hyper, direct, adjoint.indirect(), ", nor the optimizer"),
            params=loop.params(flat),
            residual=None,
            error_bound=None,
            n_hvp=0,
            n_grad=self.steps + 3,
            status=Status.APPROXIMATE,
        )
        return hypergradient, {"optimizer": after}
