"""What objectives on labels share: a small perceptron, all of it trained, with an L2 penalty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from adapters.losses import half_squares
from adapters.method import Method
from adapters.networks import MLP
from adapters.tasks import Classification

__all__ = ["Perceptron"]


class Perceptron(Method):
    """A method on a perceptron; its space has "weight_decay"."""

    def network(self) -> nn.Module:
        """A perceptron with two hidden layers of 64 units, tanh."""
        task = cast(Classification, self.setting.task)
        return MLP(task.input_shape, task.n_classes, activation="tanh")

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        """½ λ ‖w‖²."""
        return half_squares(hparams["weight_decay"], model.parameters())
