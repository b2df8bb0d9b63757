"""The outer-algorithm contract: `init` and `step`, with frozen config and explicit state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from bilevel.inner import Inner
from bilevel.metrics import Cost, RunStatus

__all__ = ["Diverged", "OuterAlgorithm", "OuterStep"]

StateT = TypeVar("StateT")


class Diverged(FloatingPointError):  # noqa: N818  (a finding, as much as an error)
    """A loss or a derivative is not finite.

    Attributes:
        cost: the work done before it was noticed.
    """

    def __init__(self, reason: str, cost: Cost) -> None:
        super().__init__(reason)
        self.cost = cost


@dataclass(frozen=True)
class OuterStep:
    """What one outer step saw and did.

    Attributes:
        loss: outer loss F(w, h) on the batch of this step.
        hparams: the constrained values h that the weights were trained with and `loss` belongs
            to.  The inner level already holds the next ones.
        grad_norms: ‖dF/dz‖₂ for each hyperparameter, z its unconstrained coordinate.
        inner_loss: training loss of the last inner step, where one was made.
        cost: work done by this step.
        estimate: status of the hypergradient ("exact", "converged", "max_iter", ...).
        residual: relative residual of its linear solve.
        error_bound: certified bound on its error.
        status: RUNNING, or why the algorithm is finished after this step.
        reason: that in words.
        extra: further numbers for the trace, such as the outer learning rate.
    """

    loss: float
    hparams: Mapping[str, Tensor]
    grad_norms: Mapping[str, float]
    inner_loss: float | None
    cost: Cost
    estimate: str
    residual: float | None = None
    error_bound: float | None = None
    status: RunStatus = RunStatus.RUNNING
    reason: str = ""
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def grad_norm(self) -> float:
        """‖dF/dz‖₂ over all hyperparameters."""
        return math.hypot(*self.grad_norms.values())


class OuterAlgorithm(ABC, Generic[StateT]):
    """Moves the gradient-owned hyperparameters of an inner level; a frozen dataclass.

    The state is a dict of tensors, numbers, strings, None, lists and dicts; `step` returns a
    new one and leaves the old one valid, so that a run can go back to it.  Weights, data
    streams and current hyperparameters are state of the inner level.
    """

    @abstractmethod
    def init(self, inner: Inner) -> StateT:
        """Return the state before the first step, from the inner level's current values."""

    @abstractmethod
    def step(self, inner: Inner, state: StateT) -> tuple[OuterStep, StateT]:
        """Train as the algorithm asks, and move the hyperparameters once.

        Raises:
            Diverged: a loss or a derivative is not finite.  The caller restores the inner level.
        """

    @abstractmethod
    def next_steps(self, state: StateT) -> int:
        """Inner steps that the next `step` takes at most: a budget of steps is never exceeded."""

    def retreat(self, inner: Inner, state: StateT) -> StateT | None:
        """Make the step after `state` less bold, after it diverged.

        Called with the inner level as it was before the failed step.  Returns the state to
        try again from, with the inner level's hyperparameters set accordingly, or None where
        there is nothing to take back.
        """
        return None
