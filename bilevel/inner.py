"""What an outer algorithm needs of the thing that trains: the inner level of a nested problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from bilevel.metrics import Metrics
from bilevel.space import Space
from hypergrad import Problem
from hypergrad.optimizers import Optimizer
from hypergrad.tree import Tree

__all__ = ["Inner"]


@runtime_checkable
class Inner(Protocol):
    """Weights that train at given hyperparameters, and the two losses between them.

    Every learner of `adapters` with pure losses is one; `ProblemInner` makes one of a bare
    `Problem`.  Hyperparameters in the losses are the gradient-owned values only, a dict of
    tensors; all other values are constants of the inner level.
    """

    @property
    def space(self) -> Space:
        """The hyperparameters and who owns each."""
        ...

    @property
    def problem(self) -> Problem:
        """Pure losses ``(params, hparams, batch) -> scalar``; random draws come from the batch."""
        ...

    @property
    def params(self) -> Tree:
        """Current weights."""
        ...

    @property
    def optimizer(self) -> Optimizer:
        """The differentiable update rule that `step` uses."""
        ...

    @property
    def optimizer_state(self) -> Any:
        """State of `optimizer` at the current weights."""
        ...

    @property
    def hparams(self) -> dict[str, Tensor]:
        """Current gradient-owned values, constrained."""
        ...

    def set_hparams(self, values: Mapping[str, Tensor]) -> None:
        """Replace gradient-owned values (constrained); the weights stay."""
        ...

    def step(self) -> Metrics:
        """Train one step at the current hyperparameters: one unit of budget."""
        ...

    def inner_batches(self, count: int) -> list[Any]:
        """Draw the next training batches; the data stream advances."""
        ...

    def outer_batch(self) -> Any:
        """Draw the next batch for the outer loss."""
        ...

    def adopt(self, params: Tree, optimizer_state: Any, steps: int) -> None:
        """Take over weights that an estimator trained for `steps` steps."""
        ...

    def evaluate(self, split: str) -> Metrics:
        """Return at least "loss" on all of a split: "train", "val" (the outer loss) or "test".

        An inner level without some of them names those that it has in a property `splits`.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future, as tensors, numbers, strings, lists and dicts."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; from here on the numbers are those of the uninterrupted run."""
        ...
