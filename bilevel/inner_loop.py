"""How long the inner level trains between two hypergradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from bilevel.algorithm import Diverged
from bilevel.inner import Inner
from bilevel.metrics import Cost, RunStatus
from hypergrad.problem import evaluate
from hypergrad.tree import hyper_leaves, trainable_leaves

__all__ = ["InnerLoop", "Steps", "Training", "Until"]


@dataclass(frozen=True)
class Training:
    """What an inner loop did.

    Attributes:
        cost: work done.
        loss: training loss of the last step; None after no step.
        grad_norm: ‖∂f/∂w‖₂ at the end, where the loop looked at it.
        solved: False where the loop has a tolerance and ended above it.
    """

    cost: Cost = field(default_factory=Cost)
    loss: float | None = None
    grad_norm: float | None = None
    solved: bool = True


class InnerLoop(ABC):
    """Trains an inner level at fixed hyperparameters.  Subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def limit(self) -> int:
        """Most steps that `train` takes."""

    @abstractmethod
    def train(self, inner: Inner) -> Training:
        """Train.

        Raises:
            Diverged: the training loss or its gradient is not finite.
        """


@dataclass(frozen=True)
class Steps(InnerLoop):
    """Train a fixed number of steps: few in an alternating loop, many in a nested one."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"Steps: count must be at least 0, but got {self.count!r}.")

    @property
    def limit(self) -> int:
        """See `InnerLoop.limit`."""
        return self.count

    def train(self, inner: Inner) -> Training:
        """See `InnerLoop.train`."""
        cost, loss = Cost(), None
        for _ in range(self.count):
            try:
                metrics = inner.step()
            except FloatingPointError as error:
                raise Diverged(str(error), cost + Cost(steps=1, gradients=1)) from error
            cost, loss = cost + metrics.cost, metrics["loss"]
            if metrics.status is RunStatus.DIVERGED:
                raise Diverged(f"the inner level diverged: its training loss is {loss}", cost)
        return Training(cost, loss)


@dataclass(frozen=True)
class Until(InnerLoop):
    """Train until ‖∂f/∂w‖₂ ≤ `grad_norm`: the inner level is solved to a tolerance.

    Attributes:
        grad_norm: tolerance on the gradient of the inner loss, on one training batch.  What the
            optimizer adds by itself (a decoupled weight decay) is no part of that loss.
        max_steps: most steps of one solve.  A solve that ends there is seen in the trace, where
            its `inner_grad_norm` is above the tolerance, and never counts as convergence.
        check_every: steps between two looks at the gradient, each a gradient evaluation.
    """

    grad_norm: float
    max_steps: int = 1000
    check_every: int = 10

    def __post_init__(self) -> None:
        if not self.grad_norm > 0:
            raise ValueError(f"Until: grad_norm must be positive, but got {self.grad_norm!r}.")
        for name in ("max_steps", "check_every"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"Until: {name} must be at least 1, but got {value}.")

    @property
    def limit(self) -> int:
        """See `InnerLoop.limit`."""
        return self.max_steps

    def train(self, inner: Inner) -> Training:
        """See `InnerLoop.train`."""
        cost, loss, left = Cost(), None, self.max_steps
        while True:
            cost += Cost(gradients=1)
            try:
                norm = inner_grad_norm(inner)
            except FloatingPointError as error:
                raise Diverged(str(error), cost) from error
            if norm <= self.grad_norm or left == 0:
                return Training(cost, loss, norm, solved=norm <= self.grad_norm)
            try:
                part = Steps(min(left, self.check_every)).train(inner)
            except Diverged as error:
                raise Diverged(str(error), cost + error.cost) from error
            cost, loss, left = cost + part.cost, part.loss, left - part.cost.steps


def inner_grad_norm(inner: Inner) -> float:
    """Return ‖∂f/∂w‖₂ at the current weights, on the next training batch.

    Raises:
        FloatingPointError: the loss or the norm is not finite.
    """
    params = trainable_leaves(inner.params)
    hparams = hyper_leaves({k: v.detach().requires_grad_() for k, v in inner.hparams.items()})
    (batch,) = inner.inner_batches(1)
    loss = evaluate(inner.problem.inner_loss, "inner loss", params, hparams, batch)
    grads = torch.autograd.grad(loss, params.tensors)
    norm = math.hypot(*(float(g.double().norm()) for g in grads))
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient of the inner loss has norm {norm}.")
    return norm
