"""Dense prediction: losses of images one by one, and views whose turn can be undone.

    ℓ_i = mean over the labeled pixels of image i of the cross entropy
    ρ_i = 1 − cos(z_i, z'_i)     of the feature maps of two views, turned back

`bilevel.adawac` and `bilevel.reweighting` need one loss a sample; averages over the batch hide it.
The published AdaWAC code compares the features of two differently turned views as they are, which
never agree; `Turns.undo` puts pixel over pixel first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = ["Turns", "disagreement", "has_foreground", "pixel_losses"]


def pixel_losses(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Return the mean cross entropy over the labeled pixels of each image, shape (batch,).

    An image without any labeled pixel has loss 0 and no gradient: nothing is known about it, so
    that AdaWAC moves it to the consistency loss.  A mask that is background everywhere is labeled.

    Args:
        logits: shape (batch, classes, height, width) for labels that are classes; shape (batch,
            height, width) or with one channel for floating masks in [0, 1].
        labels: classes, int64, or masks, floating; shape (batch, height, width).
        ignore_index: label of pixels that are not labeled.

    Raises:
        ValueError: shapes that do not fit.
    """
    classes = not labels.is_floating_point()
    maps = logits if classes or logits.dim() == 3 else logits.squeeze(1)
    fits = (
        labels.dim() == 3
        and maps.dim() == (4 if classes else 3)
        and (maps[:, 0] if classes else maps).shape == labels.shape
    )
    if not fits:
        raise ValueError(
            "logits must have shape (batch, classes, height, width) for classes, or (batch, "
            "height, width) for floating masks, and labels (batch, height, width), but got "
            f"{tuple(logits.shape)} and {labels.dtype} of {tuple(labels.shape)}."
        )
    known = labels != ignore_index
    if classes:
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    else:
        target = torch.where(known, labels, 0.0).to(maps.dtype)
        each = F.binary_cross_entropy_with_logits(maps, target, reduction="none")
        losses = torch.where(known, each, 0.0)
    return losses.sum(dim=(1, 2)) / known.sum(dim=(1, 2)).clamp(min=1)


def has_foreground(labels: Tensor, background: int = 0, ignore_index: int = -100) -> Tensor:
    """Return which masks have a labeled pixel of the foreground, bool of shape (batch,)."""
    found: Tensor = ((labels != background) & (labels != ignore_index)).flatten(1).any(dim=1)
    return found


def disagreement(
    one: Tensor, other: Tensor, kind: Literal["cosine", "square"] = "cosine"
) -> Tensor:
    """Return a distance of two feature tensors of each sample, shape (batch,).

    "cosine" is 1 − cos of the flat features, in [0, 2], and 1 where one of them is zero.  "square"
    is the mean squared difference, as published.  A network can lower the one by an offset that all
    samples share, and the other by shrinking its features, without agreeing on anything.

    Args:
        one: z, shape (batch, ...).
        other: z', of the same shape.
        kind: of the distance.

    Raises:
        ValueError: other shapes, or an unknown kind.
    """
    if one.shape != other.shape or one.dim() < 2:
        raise ValueError(
            f"one and other must have one shape (batch, ...), but got {tuple(one.shape)} and "
            f"{tuple(other.shape)}."
        )
    if kind == "square":
        return (one - other).square().flatten(1).mean(dim=1)
    if kind == "cosine":
        return 1 - F.cosine_similarity(one.flatten(1), other.flatten(1), dim=1)
    raise ValueError(f"kind must be 'cosine' or 'square', but got {kind!r}.")


@dataclass(frozen=True)
class Turns:
    """One of the eight symmetries of a square for each image: mirror, then turn.

        turns = Turns.draw(len(x), generator)
        logits = turns.undo(net(turns(x)))     # over the pixels of x again

    Attributes:
        quarters: quarter turns, integers 0 ... 3, shape (batch,).
        mirrored: whether left and right are swapped first, bool of shape (batch,).
    """

    quarters: Tensor
    mirrored: Tensor

    @classmethod
    def draw(cls, batch: int, generator: torch.Generator, *, square: bool = True) -> Turns:
        """Draw uniformly; `square=False` leaves out the turns that swap height and width."""
        quarters = torch.randint(4 if square else 2, (batch,), generator=generator)
        mirrored = torch.randint(2, (batch,), generator=generator).bool()
        return cls(quarters if square else 2 * quarters, mirrored)

    def __call__(self, maps: Tensor) -> Tensor:
        """Return the turned maps, shape (batch, ..., height, width).

        Raises:
            ValueError: another batch, or quarter turns of maps that are not square.
        """
        self._check(maps)
        maps = _where(self.mirrored, maps.flip(-1), maps)
        maps = _where(self.quarters >= 2, maps.flip(-2, -1), maps)
        return self._quarter(maps, 1)

    def undo(self, maps: Tensor) -> Tensor:
        """Return what the call was given, for maps of any resolution; raises as the call."""
        self._check(maps)
        maps = self._quarter(maps, -1)
        maps = _where(self.quarters >= 2, maps.flip(-2, -1), maps)
        return _where(self.mirrored, maps.flip(-1), maps)

    def _quarter(self, maps: Tensor, direction: int) -> Tensor:
        odd = self.quarters % 2 == 1
        if maps.shape[-1] != maps.shape[-2]:
            return maps
        return _where(odd, torch.rot90(maps, direction, (-2, -1)), maps)

    def _check(self, maps: Tensor) -> None:
        if maps.dim() < 3 or len(maps) != len(self.quarters):
            raise ValueError(
                f"maps must have shape ({len(self.quarters)}, ..., height, width), but got "
                f"{tuple(maps.shape)}."
            )
        if maps.shape[-1] != maps.shape[-2] and (self.quarters % 2 == 1).any():
            raise ValueError(
                f"quarter turns need square maps, but got {tuple(maps.shape)}; draw with "
                "square=False."
            )


def _where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask.to(no.device).reshape(-1, *[1] * (no.dim() - 1)), yes, no)
