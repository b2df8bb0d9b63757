"""Small networks that learners train from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = ["MLP", "ConvNet", "UNet"]


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


class UNet(nn.Module):
    """A small U-Net for masks (Ronneberger et al., MICCAI 2015), smooth in its weights.

    Two 3×3 convolutions a level with GroupNorm and SiLU, means over 2×2 pixels on the way down, the
    nearest pixel on the way up, and skip connections; channels double from level to level.

    Args:
        input_shape: (channels, height, width); height and width must be multiples of 2^depth.
        n_outputs: channels of the logits, 1 for a mask.
        width: channels of the first level.
        depth: halvings of the resolution.

    Raises:
        ValueError: samples that are no images, or of a size that cannot be halved so often.
    """

    def __init__(
        self, input_shape: tuple[int, ...], n_outputs: int = 1, *, width: int = 8, depth: int = 2
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(
                f"input_shape must be (channels, height, width), but got {input_shape}."
            )
        if any(side % 2**depth for side in input_shape[1:]):
            raise ValueError(
                f"height and width must be multiples of {2**depth}, but got {input_shape}."
            )
        sizes = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(map(_convolutions, [input_shape[0], *sizes[:-1]], sizes))
        self.up = nn.ModuleList(_convolutions(a + b, a) for a, b in pairwise(sizes))
        self.head = nn.Conv2d(width, n_outputs, 1)

    def forward(self, x: Tensor, perturb: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """Return logits, shape (batch, n_outputs, height, width).

        Args:
            x: shape (batch, *input_shape).
            perturb: ``(i, map of level i) -> tensor of that shape`` on the way down; the last
                level is the encoding, at a resolution of 1/2^depth.
        """
        maps: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if i else x)
            maps.append(x if perturb is None else perturb(i, x))
        x = maps.pop()
        for block in reversed(self.up):
            grown = F.interpolate(x, scale_factor=2, mode="nearest")
            x = block(torch.cat([maps.pop(), grown], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _convolutions(before: int, after: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [
            nn.Conv2d(channels, after, 3, padding=1, bias=False),
            nn.GroupNorm(math.gcd(4, after), after),
            nn.SiLU(),
        ]
    return nn.Sequential(*layers)
