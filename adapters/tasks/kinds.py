"""Kinds of tasks besides classification: regression, sequences, segmentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from adapters.tasks.task import Task

__all__ = ["Regression", "Segmentation", "Sequences"]


@dataclass(frozen=True, eq=False)
class Regression(Task):
    """A task whose "y" is a vector of real numbers, shape (rows, targets); squared error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, split in self.splits.items():
            y = split["y"]
            if y.dim() != 2 or not y.is_floating_point():
                raise ValueError(
                    f"splits[{name!r}]['y'] must be floating, of shape (rows, targets), but got "
                    f"{y.dtype} of shape {tuple(y.shape)}."
                )

    @property
    def n_targets(self) -> int:
        """Numbers that are predicted for a sample."""
        return int(self.splits["train"]["y"].shape[1])

    def measure(self, outputs: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return "loss" (mean squared error) and "absolute_error" of each sample.

        Args:
            outputs: predictions, shape (batch, targets).
            batch: with "y", shape (batch, targets).
        """
        error = outputs - batch["y"]
        return {"loss": error.square().mean(dim=1), "absolute_error": error.abs().mean(dim=1)}


@dataclass(frozen=True, eq=False)
class Sequences(Task):
    """Next-token prediction: "x" and "y" are token ids, shape (rows, length), y one step ahead.

    Attributes:
        n_tokens: ids are 0 ... n_tokens − 1.
        alphabet: the text of each id; empty where a tokenizer of its own decodes them.
        floating: floating type of the weights trained on the task, since ids have none.
    """

    n_tokens: int = field(kw_only=True)
    alphabet: tuple[str, ...] = field(kw_only=True, default=())
    floating: torch.dtype = field(kw_only=True, default=torch.float32)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, split in self.splits.items():
            for key in ("x", "y"):
                ids = split[key]
                if ids.dtype != torch.int64 or ids.dim() != 2:
                    raise ValueError(
                        f"splits[{name!r}][{key!r}] must be int64 of shape (rows, length), but "
                        f"got {ids.dtype} of shape {tuple(ids.shape)}."
                    )
                if int(ids.min()) < 0 or int(ids.max()) >= self.n_tokens:
                    raise ValueError(
                        f"splits[{name!r}][{key!r}] must lie in 0 ... {self.n_tokens - 1}, but "
                        f"got {int(ids.min())} ... {int(ids.max())}."
                    )

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights trained on the task."""
        return self.floating

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Self:
        """Return the task for weights of `dtype`, with all tensors on `device`."""
        moved = super().to(device=device)
        return moved if dtype is None else dataclasses.replace(moved, floating=dtype)

    def measure(self, outputs: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return "loss" (nats a token) and "accuracy" of each row.

        Args:
            outputs: logits, shape (batch, length, n_tokens).
            batch: with "y", shape (batch, length).
        """
        losses = F.cross_entropy(outputs.transpose(1, 2), batch["y"], reduction="none")
        hits = (outputs.argmax(dim=2) == batch["y"]).to(outputs.dtype)
        return {"loss": losses.mean(dim=1), "accuracy": hits.mean(dim=1)}


@dataclass(frozen=True, eq=False)
class Segmentation(Task):
    """A task whose "y" is a mask of zeros and ones, shape (rows, height, width)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, split in self.splits.items():
            x, y = split["x"], split["y"]
            if x.dim() != 4 or y.shape != (len(x), *x.shape[2:]):
                raise ValueError(
                    f"splits[{name!r}] must hold images (rows, channels, height, width) and masks "
                    f"(rows, height, width), but got {tuple(x.shape)} and {tuple(y.shape)}."
                )

    def measure(self, outputs: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return "loss" (binary cross entropy a pixel) and "iou" of each image.

        Intersection over union is 1 where neither the mask nor the prediction has a pixel.

        Args:
            outputs: logits of the foreground, shape (batch, height, width) or with one channel.
            batch: with "y", shape (batch, height, width).
        """
        y = batch["y"]
        logits = outputs.reshape(y.shape)
        losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
        predicted, mask = logits > 0, y > 0.5
        both = (predicted & mask).sum(dim=(1, 2))
        either = (predicted | mask).sum(dim=(1, 2))
        iou = torch.where(either > 0, both / either.clamp(min=1), 1.0)
        return {"loss": losses.mean(dim=(1, 2)), "iou": iou.to(outputs.dtype)}
