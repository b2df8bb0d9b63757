"""The losses of a network whose weights respond, as pure functions of all tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import optree
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bilevel.self_tuning.convert import Converted
from bilevel.self_tuning.data import rows_of
from bilevel.self_tuning.layout import Layout
from bilevel.self_tuning.perturbation import unpack
from hypergrad import seeded
from hypergrad.attention import math_attention
from hypergrad.swap import Swap

__all__ = ["Functions", "Loss", "Measure", "Objective", "OuterLoss", "Penalty", "Predict"]

Values = Mapping[str, Any]
"""Hyperparameters by name, example by example."""

Predict = Callable[[nn.Module, Values, Any], Any]
Loss = Callable[[Any, Values, Any], Tensor]
OuterLoss = Callable[[Any, Any], Tensor]
Penalty = Callable[[nn.Module, Values], Tensor]
Measure = Callable[[Any, Any], Mapping[str, Tensor]]


def forward(module: nn.Module, values: Values, batch: Any) -> Any:
    """Return ``module(batch["x"])``."""
    return module(batch["x"])


@dataclass(frozen=True)
class Functions:
    """What the losses are made of; see `ModuleInner`."""

    predict: Predict
    loss: Loss
    outer_loss: OuterLoss
    penalty: Penalty | None
    metrics: Measure | None


class Objective:
    """L_T and L_V of a converted network.

    Args:
        functions: given by the user.
        converted: the network.
        layout: of λ.
        constants: active hyperparameters that the gradient does not own.
        device: where random numbers are drawn.
    """

    def __init__(
        self,
        functions: Functions,
        converted: Converted,
        layout: Layout,
        constants: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.functions, self.constants = functions, constants
        self._converted, self._layout, self._device = converted, layout, device
        self._swap = Swap(converted.module)

    def buffers(self) -> dict[str, Tensor]:
        """Return the live buffers of the network by name."""
        return self._swap.buffers()

    def training_loss(
        self,
        params: Mapping[str, Tensor],
        values: Values,
        batch: Any,
        seed: int,
        *,
        shift: Tensor | None = None,
        linearized: bool = False,
        live: bool = False,
    ) -> Tensor:
        """Return L_T; see `ResponseModel.training_loss`.

        Args:
            params: trained tensors by name, and responses where there is a shift.
            values: hyperparameters example by example.
            batch: the batch.
            seed: of the random draws.
            shift: of λ; None for no response.
            linearized: at the first-order outputs.
            live: whether BatchNorm statistics move.
        """
        values = {**self.constants, **values}
        outputs = self.outputs(
            params, values, batch, seed,
            shift=shift, linearized=linearized, training=True, live=live,
        )  # fmt: skip
        loss = self.functions.loss(outputs, values, batch).mean()
        if self.functions.penalty is None:
            return loss
        with self._swap.filled(params), self._converted.perturbation.active(shift, values):
            return loss + self.functions.penalty(self._converted.module, values).mean()

    def outer_loss(
        self, params: Mapping[str, Tensor], batch: Any, seed: int, shift: Tensor | None = None
    ) -> Tensor:
        """Return L_V, in evaluation mode."""
        outputs = self.outputs(params, self.constants, batch, seed, shift=shift, training=False)
        return self.functions.outer_loss(outputs, batch).mean()

    def measure(self, params: Mapping[str, Tensor], batch: Any) -> dict[str, Tensor]:
        """Return L_V and the user's metrics, each a mean or one number per row."""
        with torch.no_grad():
            outputs = self.outputs(params, self.constants, batch, 0, training=False)
            found = {"loss": self.functions.outer_loss(outputs, batch)}
            if self.functions.metrics is not None:
                found |= self.functions.metrics(outputs, batch)
        return found

    def outputs(
        self,
        params: Mapping[str, Tensor],
        values: Values,
        batch: Any,
        seed: int,
        *,
        training: bool,
        shift: Tensor | None = None,
        linearized: bool = False,
        live: bool = False,
    ) -> Any:
        """Return what `predict` returns, at given weights; when linearized, to first order.

        Raises:
            NotImplementedError: an operation without a forward-mode derivative.
        """
        net, predict = self._converted.module, self.functions.predict
        if net.training is not training:
            net.train(training)
        tensors = dict(params)
        if not live:
            tensors |= {n: b.detach().clone() for n, b in self._swap.buffers().items()}
        with (
            seeded(seed, [self._device]),
            self._swap.filled(tensors),
            self._converted.perturbation.active(shift, values, linearized),
        ):
            if not linearized:
                return predict(net, values, batch)
            with forward_ad.dual_level(), math_attention():
                try:
                    dual = predict(net, values, batch)
                except NotImplementedError as error:
                    raise NotImplementedError(
                        f"the linearized response needs forward-mode derivatives: {error}  Use "
                        "SelfTuning(linearize=False)."
                    ) from error
                return optree.tree_map(_first_order, dual)

    def expanded(self, hparams: Mapping[str, Tensor], batch: Any) -> dict[str, Any]:
        """Return values in the shapes that the losses see: equal for all examples."""
        rows = rows_of(batch)
        found = {}
        for name, value in hparams.items():
            rounded = self._layout.round(name, value)
            shared = name in self._layout.per_batch
            found[name] = rounded if shared else rounded.expand(rows, *rounded.shape)
        return found


def _first_order(output: Any) -> Tensor:
    """Return ŷ + J Θ s, a constant distance from ŷ in the graph; see `Perturbation.add`."""
    value, tangent = unpack(cast(Tensor, output))
    return value if tangent is None else value + tangent.detach()
