"""The pure losses of a method on a network, and what evaluates them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.functional import Functional
from adapters.method import Batch, Method
from bilevel.space import Space
from hypergrad import Problem, TwoViewLoss, seeded

__all__ = ["Objective"]

Params = Mapping[str, Tensor]


class Objective:
    """Losses ``(params, hparams, batch) -> scalar`` of a method.

    Random numbers drawn inside are seeded by ``batch["seed"]``, and the default generators are
    put back afterwards; buffers that a loss would change (BatchNorm statistics) stay as they
    are.  So the losses are functions of their arguments, which replays and finite differences
    rely on.

    Args:
        method: whose hooks are called.
        model: the network, with the frozen tensors and the buffers.
        space: of the values in `hparams`.
        horizon: steps that a schedule spans; None without schedules.

    Raises:
        ValueError: no parameter of the network requires grad.
    """

    def __init__(self, method: Method, model: nn.Module, space: Space, horizon: int | None) -> None:
        self.functional = Functional(model, method.set_mode)
        self._method = method
        self._space = space
        self._horizon = horizon
        self._devices = [method.setting.task.device]
        self._has_detached = type(method).detached is not Method.detached

    @property
    def problem(self) -> Problem:
        """Training and validation loss as a nested problem."""
        inner = TwoViewLoss(self._two_views) if self._has_detached else self.training_loss
        return Problem(inner, self.outer_loss)

    def values(self, hparams: Mapping[str, Tensor], step: int) -> dict[str, Any]:
        """Return all active hyperparameters at a step: the given ones and the constants."""
        values = {**self._method.setting.constants, **hparams}
        if self._horizon is None:
            return values
        return self._space.at(values, min(1.0, step / self._horizon))

    def training_loss(
        self, params: Params, hparams: Mapping[str, Tensor], batch: Batch, live: bool = False
    ) -> Tensor:
        """Return loss + penalty in training mode; detached quantities carry no gradient.

        Args:
            params: trained tensors by name.
            hparams: gradient-owned values.
            batch: see `Stream`.
            live: a real training step: changes of buffers stay.
        """
        values = self.values(hparams, batch["step"])
        with seeded(batch["seed"], self._devices):
            if self._has_detached:
                with torch.no_grad():
                    batch = self._with_detached(params, values, batch)
            return self.functional(self._objective, params, values, batch, training=True, live=live)

    def outer_loss(self, params: Params, hparams: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the validation loss in evaluation mode."""
        values = self.values(hparams, batch["step"])
        with seeded(batch["seed"], self._devices):
            return self.functional(self._method.outer_loss, params, values, batch, training=False)

    def measure(
        self, params: Params, hparams: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Return the metrics of each sample in evaluation mode."""
        values = self.values(hparams, batch["step"])
        with torch.no_grad(), seeded(batch["seed"], self._devices):
            return self.functional(self._method.measure, params, values, batch, training=False)

    def _two_views(
        self, moving: Params, frozen: Params, hparams: Mapping[str, Tensor], batch: Batch
    ) -> Tensor:
        """The training loss with its detached quantities computed from a second view."""
        values = self.values(hparams, batch["step"])
        with seeded(batch["seed"], self._devices):
            batch = self._with_detached(frozen, values, batch)
            return self.functional(self._objective, moving, values, batch, training=True)

    def _with_detached(self, params: Params, values: Mapping[str, Any], batch: Batch) -> Batch:
        found = self.functional(self._method.detached, params, values, batch, training=True)
        return {**batch, **found}

    def _objective(self, model: nn.Module, values: Mapping[str, Any], batch: Batch) -> Tensor:
        loss = self._method.loss(model, values, batch)
        penalty = self._method.penalty(model, values)
        return loss if penalty is None else loss + penalty
