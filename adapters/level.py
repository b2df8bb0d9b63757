"""What one phase trains: the losses, the flat vector of trained tensors, and the update rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.assembly import Assembly
from adapters.method import Batch, Method
from adapters.objective import Objective
from adapters.updates import Annealed, EditedGradient, Knots
from bilevel.checks import did_you_mean
from hypergrad.attention import math_attention
from hypergrad.optimizers import Hyper, Optimizer, State, Value, Values
from hypergrad.optimizers.flat import flatten, unflatten
from hypergrad.optimizers.values import constants
from hypergrad.training import is_finite
from hypergrad.tree import trainable_leaves, zeros_for_none

__all__ = ["Level", "Move"]


class Move(NamedTuple):
    """A training step.

    Attributes:
        flat: the next weights.
        state: the next optimizer state.
        grad: the gradient of loss + penalty before the step.
    """

    flat: Tensor
    state: State
    grad: Tensor


class Level:
    """The fixed part of a phase; all that moves is passed in and returned.

    Attributes:
        objective: the losses.
        names: of the trained tensors, in the order of the flat vector.
        initial: the flat vector at the network's own weights.
        optimizer: the method's update rule, with its edit of gradients and its schedules.

    Args:
        assembly: method and network; what requires grad is trained.
        horizon: steps that schedules span.
        done: steps done before this phase.

    Raises:
        ValueError: nothing to train, or the optimizer names no active hyperparameter.
    """

    def __init__(self, assembly: Assembly, horizon: int | None, done: int) -> None:
        self._method = assembly.method
        self._owned, self._schedules = assembly.hparams, assembly.schedules
        horizon = horizon if assembly.schedules else None
        self.objective = Objective(assembly.method, assembly.model, assembly.space, horizon)
        trained = self.objective.functional.trained
        self.names = list(trained)
        assembly.method.trained = frozenset(trained)
        self._leaves = trainable_leaves(trained)
        self.initial = flatten(self._leaves.tensors)
        rule = assembly.method.optimizer(self._hyper)
        if type(assembly.method).after_backward is not Method.after_backward:
            rule = EditedGradient(rule, self._edit)
        if horizon is not None:
            rule = Annealed(rule, horizon, done)
        self.optimizer: Optimizer = rule

    def _hyper(self, name: str) -> Value:
        """Return what an optimizer field takes for a hyperparameter."""
        known = {**self._method.setting.constants, **dict.fromkeys(self._owned)}
        if name not in known:
            raise ValueError(
                f"{self._method.name} has no active hyperparameter {name!r}; "
                f"{did_you_mean(name, known)}"
            )
        value = Hyper(name) if name in self._owned else known[name]
        return Knots.of(self._schedules[name], value) if name in self._schedules else value

    def _edit(self, grad: Tensor, flat: Tensor) -> Tensor:
        edited = self._method.after_backward(self.named(grad), self.named(flat))
        return torch.cat([edited[name].reshape(-1) for name in self.names])

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of a flat vector by name."""
        return dict(zip(self.names, unflatten(flat, self._leaves.tensors), strict=True))

    def pack(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the flat vector of trained tensors.

        Raises:
            ValueError: other names or shapes than the trained tensors have.
        """
        found = {name: tuple(value.shape) for name, value in sorted(params.items())}
        expected = {n: tuple(v.shape) for n, v in self.named(self.initial).items()}
        if found != expected:
            raise ValueError(f"params must have shapes {expected}, but got {found}.")
        return flatten([params[name] for name in self.names]).to(self.initial)

    def resolve(self, hparams: Mapping[str, Tensor]) -> Values:
        """Return the values of the optimizer's hyperparameters.

        Raises:
            ValueError: a value that the optimizer cannot have.
        """
        given = {name: value.detach().requires_grad_() for name, value in hparams.items()}
        return constants(self.optimizer.resolve(given, self._leaves))

    def update(
        self,
        flat: Tensor,
        state: State,
        hparams: Mapping[str, Tensor],
        values: Values,
        batch: Batch,
    ) -> tuple[float, Move | None]:
        """Take a training step; buffers of the network move.

        Returns:
            The training loss, and the move; None where loss, gradient or weights are not finite.
        """
        value, grad = self.gradient(flat, hparams, batch, live=True)
        if grad is None:
            return value, None
        with torch.no_grad():
            after, state = self.optimizer.update(flat, grad, state, values)
        return value, Move(after, state, grad) if is_finite(after) else None

    def gradient(
        self, flat: Tensor, hparams: Mapping[str, Tensor], batch: Batch, *, live: bool
    ) -> tuple[float, Tensor | None]:
        """Return the training loss of a batch and its gradient; None for a loss that is not finite.

        Args:
            flat: the weights.
            hparams: gradient-owned values.
            batch: of a training step.
            live: whether buffers of the network move.
        """
        views = [view.requires_grad_() for view in unflatten(flat, self._leaves.tensors)]
        params: Any = dict(zip(self.names, views, strict=True))
        with torch.enable_grad(), math_attention():
            loss = self.objective.training_loss(params, hparams, batch, live=live)
            value = float(loss.detach())
            if not is_finite(loss.detach()):
                return value, None
            found = torch.autograd.grad(loss, views, allow_unused=True)
        return value, flatten(zeros_for_none(found, views))
