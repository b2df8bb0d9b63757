"""Small networks that learners train from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

__all__ = ["MLP", "ConvNet"]


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


class ConvNet(nn.Module):
    """Three 3×3 convolutions with ReLU, a mean over pixels, and a linear layer to logits.

    The second and third convolution have stride 2 and twice the channels of the one before.

    Args:
        input_shape: (channels, height, width).
        n_classes: number of logits.
        width: channels of the first convolution.
        batch_norm: whether BatchNorm follows each convolution.

    Raises:
        ValueError: samples that are no images.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        n_classes: int,
        *,
        width: int = 16,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(
                f"input_shape must be (channels, height, width), but got {input_shape}."
            )
        sizes = [input_shape[0], width, 2 * width, 4 * width]
        blocks: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            stride = 1 if i == 0 else 2
            blocks.append(nn.Conv2d(before, after, 3, stride, padding=1, bias=not batch_norm))
            if batch_norm:
                blocks.append(nn.BatchNorm2d(after))
            blocks.append(nn.ReLU())
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(sizes[-1], n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, n_classes), of x, shape (batch, *input_shape)."""
        features: Tensor = self.features(x)
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits
