"""Corruptions of images with values in [0, 1], as formulas; none of them needs a file.

    noise        clamp(x + 0.4 s ε),  ε ~ N(0, 1) per pixel
    contrast     1/2 + (1 − 0.85 s)(x − 1/2)
    brightness   x + 0.6 s (1 − x)
    salt_pepper  a share 0.25 s of the pixels is 0 or 1, with equal chance
    blur         (1 − s) x + s G x,  G the 3×3 binomial filter [1 2 1]ᵀ[1 2 1] / 16
    dropout      a share 0.35 s of the pixels is 0
    shift        moved by round(2 s u) pixels along each axis, u uniform in [−1, 1], zeros behind
    inversion    (1 − s) x + s (1 − x)

s ∈ [0, 1] is the strength; s = 0 changes nothing.  The families are those of Hendrycks and
Dietterich, ICLR 2019, scaled to small images; the constants are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bilevel.checks import did_you_mean, real

__all__ = ["CORRUPTIONS", "corrupt", "corrupt_randomly"]

Corruption = Callable[[Tensor, float, torch.Generator], Tensor]


def _like(x: Tensor, draw: Callable[..., Tensor], generator: torch.Generator) -> Tensor:
    """Random numbers like x; drawn in double, so that they do not depend on its type."""
    return draw(x.shape, generator=generator, dtype=torch.float64).to(x)


def _noise(x: Tensor, s: float, generator: torch.Generator) -> Tensor:
    return (x + 0.4 * s * _like(x, torch.randn, generator)).clamp(0, 1)


def _contrast(x: Tensor, s: float, generator: torch.Generator) -> Tensor:
    return 0.5 + (1 - 0.85 * s) * (x - 0.5)


def _brightness(x: Tensor, s: float, generator: torch.Generator) -> Tensor:
    return x + 0.6 * s * (1 - x)


def _salt_pepper(x: Tensor, s: float, generator: torch.Generator) -> Tensor:
    hit = _like(x, torch.rand, generator) < 0.25 * s
    return torch.where(hit, (_like(x, torch.rand, generator) < 0.5).to(x), x)


def _blur(x: Tensor, s: float, generator: torch.Generator) -> Tensor:
    channels = x.shape[1]
    line = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device)
    kernel = (torch.outer(line, line) / 16).expand(channels, 1, 3, 3)
    return torch.lerp(x, F.conv2d(x, kernel, padding=1, groups=channels), s)


def _dropout(x: Tensor, s: float, generator: torch.Generator) -> Tensor:
    return x * (_like(x, torch.rand, generator) >= 0.35 * s)


def _shift(x: Tensor, s: float, generator: torch.Generator) -> Tensor:
    moves = 2 * torch.rand(len(x), 2, generator=generator, dtype=torch.float64) - 1
    height, width = x.shape[-2:]
    padded, rows = F.pad(x, (2, 2, 2, 2)), []
    for image, (down, right) in zip(padded, (2 * s * moves).round().int().tolist(), strict=True):
        rows.append(image[:, 2 - down : 2 - down + height, 2 - right : 2 - right + width])
    return torch.stack(rows)


def _inversion(x: Tensor, s: float, generator: torch.Generator) -> Tensor:
    return torch.lerp(x, 1 - x, s)


CORRUPTIONS: Mapping[str, Corruption] = {
    "noise": _noise,
    "contrast": _contrast,
    "brightness": _brightness,
    "salt_pepper": _salt_pepper,
    "blur": _blur,
    "dropout": _dropout,
    "shift": _shift,
    "inversion": _inversion,
}
"""Every corruption by name, ``(x, strength, generator) -> x``."""


def corrupt(x: Tensor, name: str, strength: float, generator: torch.Generator) -> Tensor:
    """Corrupt a batch of images.

    Args:
        x: values in [0, 1], shape (batch, channels, height, width).
        name: one of `CORRUPTIONS`.
        strength: s in [0, 1].
        generator: for every random draw; on the CPU.

    Raises:
        ValueError: an unknown name, a strength outside [0, 1], or not a batch of images.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}; {did_you_mean(name, CORRUPTIONS)}")
    strength = real("strength", strength)
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must lie in [0, 1], but got {strength}.")
    if x.dim() != 4:
        raise ValueError(
            f"x must have shape (batch, channels, height, width), but got {tuple(x.shape)}."
        )
    return CORRUPTIONS[name](x, strength, generator)


def corrupt_randomly(
    x: Tensor, names: Sequence[str], strength: float, share: float, generator: torch.Generator
) -> Tensor:
    """Corrupt each image, with probability `share`, by one of the named corruptions.

    Raises:
        ValueError: see `corrupt`.
    """
    which = torch.randint(len(names), (len(x),), generator=generator)
    which[torch.rand(len(x), generator=generator) >= share] = -1
    out = x.clone()
    for i, name in enumerate(names):
        rows = which == i
        if rows.any():
            out[rows] = corrupt(x[rows], name, strength, generator)
    return out
