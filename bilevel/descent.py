"""Gradient descent on the hyperparameters, nested or alternating."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, cast

import optree
import torch
from torch import Tensor

from bilevel.algorithm import Diverged, OuterAlgorithm, OuterStep
from bilevel.checkpoint import copy
from bilevel.describe import describe
from bilevel.inner import Inner
from bilevel.inner_loop import InnerLoop, Steps, Training
from bilevel.metrics import Cost, RunStatus
from bilevel.outer_optimizer import OptimizerFactory, optimizer_step
from hypergrad import Estimator, Hypergradient, Implicit

__all__ = ["Descent", "DescentState"]


class DescentState(TypedDict):
    """State of `Descent`, plain data.

    Attributes:
        step: outer steps done.
        z: unconstrained coordinates.
        previous: z before the last move; None before the first.
        scale: what is left of the learning rate after retreats.
        optimizer: state of the outer optimizer; None before its first step.
        estimator: state of the estimator.
        start: trained tensors and optimizer state at the beginning, for `restart`.
    """

    step: int
    z: dict[str, Tensor]
    previous: dict[str, Tensor] | None
    scale: float
    optimizer: dict[str, Any] | None
    estimator: dict[str, Any]
    start: list[Any] | None


@dataclass(frozen=True)
class Descent(OuterAlgorithm[DescentState]):
    """Train, estimate dF/dh, take one step of a `torch.optim` optimizer; repeat.

    The hyperparameters h = c(z) move in the unconstrained coordinates z of the space:

        z ← z − lr · u(∇z),   ∇z = c'(z)ᵀ dF/dh,   u the optimizer's update rule.

    Alternating and nested loops differ in numbers only: a few `inner_steps` from the current
    weights, or many (or until a tolerance), from the current weights or, with `restart`, from
    the initial ones.  An estimator that trains itself (`Unrolled`, `Forward`) needs no others:
    its own steps are the training.

    A loss or derivative that is not finite undoes the outer step; the last move of z and the
    learning rate are halved, at most twice in a row, before the run ends as diverged.

    Attributes:
        estimator: how dF/dh is computed.
        optimizer: a `torch.optim` class; bind its other arguments with `functools.partial`.
        lr: outer learning rate in z, or one for each hyperparameter by name.
        inner_steps: training before each hypergradient: a number of steps or an `InnerLoop`
            such as `Until(grad_norm=1e-6)`.  Default: 1, or 0 where the estimator trains.
        warmup: further training steps before the first hypergradient.
        restart: begin each outer step's training at the initial weights and optimizer state.
        clip: largest ‖∇z‖₂; a longer gradient is scaled down to it.
        tolerance: the run has converged when ‖∇z‖₂ is at most this, the inner level is solved to
            the tolerance of its loop and the hypergradient to that of its estimator.  None: go on
            until the budget is spent.

    Raises:
        TypeError: an estimator that is none.
        ValueError: an argument out of its range.
    """

    estimator: Estimator[Any] = field(default_factory=Implicit)
    optimizer: OptimizerFactory = torch.optim.Adam
    lr: float | Mapping[str, float] = 0.05
    inner_steps: int | InnerLoop | None = None
    warmup: int = 0
    restart: bool = False
    clip: float | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Estimator):
            raise TypeError(
                "Descent: estimator must be one of hypergrad, such as Implicit(), but got "
                f"{self.estimator!r}."
            )
        rates = self.lr if isinstance(self.lr, Mapping) else {None: self.lr}
        for name, rate in rates.items():
            if not (math.isfinite(rate) and rate >= 0):
                where = "lr" if name is None else f"lr[{name!r}]"
                raise ValueError(f"Descent: {where} must be finite and >= 0, but got {rate!r}.")
        if isinstance(self.inner_steps, int) and self.inner_steps < 0:
            raise ValueError(f"Descent: inner_steps must be >= 0, but got {self.inner_steps!r}.")
        if self.warmup < 0:
            raise ValueError(f"Descent: warmup must be >= 0, but got {self.warmup!r}.")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"Descent: clip must be positive, but got {self.clip!r}.")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"Descent: tolerance must be >= 0, but got {self.tolerance!r}.")

    def init(self, inner: Inner) -> DescentState:
        """See `OuterAlgorithm.init`.

        Raises:
            ValueError: the gradient owns no active hyperparameter; `lr` does not name each that
                it owns; the estimator trains by another rule than the inner level.
        """
        z = copy(inner.space.coordinates(inner.hparams))
        if not z:
            raise ValueError(
                "space: the gradient owns none of the active hyperparameters of "
                f"{list(inner.space)}, so there is nothing to tune; see Space.own."
            )
        if isinstance(self.lr, Mapping) and set(self.lr) != set(z):
            raise ValueError(
                f"Descent: lr must name each of {list(z)}, but it names {list(self.lr)}."
            )
        _set(inner, z)
        hparams = {k: v.detach().requires_grad_() for k, v in inner.hparams.items()}
        memory = self._estimator(inner).init(inner.problem, inner.params, hparams)
        start = [optree.tree_leaves(inner.params), inner.optimizer_state] if self.restart else None
        return {
            "step": 0,
            "z": z,
            "previous": None,
            "scale": 1.0,
            "optimizer": None,
            "estimator": memory,
            "start": copy(start),
        }

    def next_steps(self, state: DescentState) -> int:
        """See `OuterAlgorithm.next_steps`."""
        warmup = self.warmup if state["step"] == 0 else 0
        return warmup + self._loop.limit + self.estimator.steps

    def step(self, inner: Inner, state: DescentState) -> tuple[OuterStep, DescentState]:
        """See `OuterAlgorithm.step`."""
        training = self._train(inner, state)
        seen = dict(inner.hparams)
        found, memory, cost = self._estimate(inner, state, training.cost)
        grads = _chain(inner, state["z"], found)
        norms = {name: float(grad.double().norm()) for name, grad in grads.items()}
        total = math.hypot(*norms.values())
        if not math.isfinite(total):
            raise Diverged(f"the hypergradient has norm {total}: {norms}", cost)
        extra = {"lr_scale": state["scale"]}
        if training.grad_norm is not None:
            extra["inner_grad_norm"] = training.grad_norm
        report = OuterStep(
            loss=float(found.value),
            hparams=seen,
            grad_norms=norms,
            inner_loss=training.loss,
            cost=cost,
            estimate=found.status.value,
            residual=found.residual,
            error_bound=found.error_bound,
            extra=extra,
        )
        solved = training.solved and found.status.ok
        if self.tolerance is not None and solved and total <= self.tolerance:
            reason = f"the hypergradient norm {total:.3g} is within the tolerance"
            report = replace(report, status=RunStatus.CONVERGED, reason=reason)
            return report, {**state, "step": state["step"] + 1, "estimator": memory}
        shrink = 1.0 if self.clip is None else min(1.0, self.clip / total)
        z, optimizer = optimizer_step(
            self.optimizer,
            state["z"],
            {name: grad * shrink for name, grad in grads.items()},
            self._rates(state),
            state["optimizer"],
        )
        _set(inner, z)
        return report, {
            "step": state["step"] + 1,
            "z": z,
            "previous": state["z"],
            "scale": state["scale"],
            "optimizer": optimizer,
            "estimator": memory,
            "start": state["start"],
        }

    def retreat(self, inner: Inner, state: DescentState) -> DescentState | None:
        """Halve the last move of z and the learning rate; see `OuterAlgorithm.retreat`."""
        previous = state["previous"]
        if previous is None:
            return None
        z = {name: torch.lerp(previous[name], last, 0.5) for name, last in state["z"].items()}
        _set(inner, z)
        return {**state, "z": z, "scale": state["scale"] / 2}

    @property
    def _loop(self) -> InnerLoop:
        if self.inner_steps is None:
            return Steps(0 if self.estimator.steps else 1)
        return Steps(self.inner_steps) if isinstance(self.inner_steps, int) else self.inner_steps

    def _rates(self, state: DescentState) -> dict[str, float]:
        lr = self.lr
        return {
            name: state["scale"] * (lr[name] if isinstance(lr, Mapping) else lr)
            for name in state["z"]
        }

    def _estimator(self, inner: Inner) -> Estimator[Any]:
        """Return the estimator, with the inner level's optimizer where it left that open."""
        estimator: Any = self.estimator
        if not hasattr(estimator, "optimizer"):
            return self.estimator
        if estimator.optimizer is None:
            return cast(Estimator[Any], replace(estimator, optimizer=inner.optimizer))
        if estimator.steps and describe(estimator.optimizer) != describe(inner.optimizer):
            raise ValueError(
                f"{type(estimator).__name__} trains with {estimator.optimizer!r}, but the inner "
                f"level with {inner.optimizer!r}; leave the estimator's optimizer out to use the "
                "inner level's."
            )
        return self.estimator

    def _train(self, inner: Inner, state: DescentState) -> Training:
        """Train before the hypergradient, from the initial weights where the config says so."""
        if state["start"] is not None and state["step"] > 0:
            leaves, optimizer_state = copy(state["start"])
            now, spec = optree.tree_flatten(inner.params)
            for leaf, like in zip(leaves, now, strict=True):
                leaf.requires_grad_(like.requires_grad)
            inner.adopt(optree.tree_unflatten(spec, leaves), optimizer_state, steps=0)
        warmup = Steps(self.warmup if state["step"] == 0 else 0).train(inner)
        try:
            training = self._loop.train(inner)
        except Diverged as error:
            raise Diverged(str(error), warmup.cost + error.cost) from error
        return replace(training, cost=warmup.cost + training.cost)

    def _estimate(
        self, inner: Inner, state: DescentState, spent: Cost
    ) -> tuple[Hypergradient, dict[str, Any], Cost]:
        """Estimate dF/dh at the current weights; an estimator that trains moves them on."""
        estimator, memory = self._estimator(inner), state["estimator"]
        hparams = {name: v.detach().requires_grad_() for name, v in inner.hparams.items()}
        if estimator.steps:
            if self.restart:
                memory = estimator.init(inner.problem, inner.params, hparams)
            memory = {**memory, "optimizer": inner.optimizer_state}
        batches = inner.inner_batches(max(1, estimator.steps))
        try:
            found, memory = estimator(
                inner.problem,
                inner.params,
                hparams,
                batches.__getitem__ if estimator.steps else batches[0],
                inner.outer_batch(),
                memory,
            )
        except FloatingPointError as error:
            lost = Cost(steps=estimator.steps, gradients=estimator.steps)
            raise Diverged(str(error), spent + lost) from error
        if estimator.steps:
            inner.adopt(found.params, memory["optimizer"], estimator.steps)
        cost = Cost(steps=estimator.steps, gradients=found.n_grad, hvps=found.n_hvp)
        return found, memory, spent + cost


def _set(inner: Inner, z: Mapping[str, Tensor]) -> None:
    """Put the inner level at the hyperparameters c(z)."""
    with torch.no_grad():
        inner.set_hparams(inner.space.constrain(z))


def _chain(inner: Inner, z: Mapping[str, Tensor], found: Hypergradient) -> dict[str, Tensor]:
    """Return dF/dz = c'(z)ᵀ dF/dh."""
    leaves = {name: value.detach().requires_grad_() for name, value in z.items()}
    hparams = inner.space.constrain(leaves)
    grads = torch.autograd.grad(
        [hparams[name] for name in leaves],
        list(leaves.values()),
        [found.grad[name].to(hparams[name]) for name in leaves],
    )
    return dict(zip(leaves, grads, strict=True))
