"""Small networks that learners train from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Multilayer perceptron: hidden layers, then a linear layer to logits.

    Attributes:
        layers: the linear layers in order, the last one to the logits.
        activations: known names of hidden activations.

    Args:
        input_shape: shape of one sample; it is flattened.
        n_classes: number of logits.
        width: units of each hidden layer, or of the hidden layers one by one.
        depth: number of hidden layers of equal width; 0 gives a linear model.
        activation: one of `activations`.

    Raises:
        ValueError: an unknown activation.
    """

    activations: ClassVar[dict[str, Callable[[], nn.Module]]] = {
        "relu": nn.ReLU,
        "silu": nn.SiLU,
        "tanh": nn.Tanh,
    }

    def __init__(
        self,
        input_shape: tuple[int, ...],
        n_classes: int,
        *,
        width: int | tuple[int, ...] = 64,
        depth: int = 2,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if activation not in self.activations:
            raise ValueError(
                f"activation must be one of {sorted(self.activations)}, but got {activation!r}."
            )
        hidden = width if isinstance(width, tuple) else (width,) * depth
        sizes = [math.prod(input_shape), *hidden, n_classes]
        self.layers = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
        self.activation = self.activations[activation]()

    def forward(self, x: Tensor, perturb: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """Return logits, shape (batch, n_classes).

        Args:
            x: shape (batch, *input_shape).
            perturb: ``(i, input of layer i) -> tensor of that shape``, such as dropout; i = 0 is
                the flattened sample.
        """
        h = x.flatten(1)
        for i, layer in enumerate(self.layers):
            if i:
                h = self.activation(h)
            if perturb is not None:
                h = perturb(i, h)
            h = layer(h)
        return h
