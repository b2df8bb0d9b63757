"""What a learner is given: named splits of tensors, and how its outputs are scored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bilevel.checks import did_you_mean

__all__ = ["Classification", "Split", "Task"]

Split = Mapping[str, Tensor]
"""Tensors with one row per sample: "x", "y" and whatever else a method asks for."""

TaskT = TypeVar("TaskT", bound="Task")


@dataclass(frozen=True, eq=False)
class Task(ABC):
    """Data in named splits, and how outputs for them are scored.

    The outer loss is taken on "val"; "test" is for the final report only.

    Attributes:
        name: the registry name.
        splits: "train", "val" and "test"; each a mapping with at least "x" and "y", one row
            per sample.
        options: the arguments that `adapters.tasks.get` makes the same task from again.
    """

    name: str
    splits: Mapping[str, Split]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for needed in ("train", "val", "test"):
            if needed not in self.splits:
                raise ValueError(
                    f"splits must hold 'train', 'val' and 'test', but got {sorted(self.splits)}."
                )
        for name, split in self.splits.items():
            if not {"x", "y"} <= set(split):
                raise ValueError(
                    f"splits[{name!r}] must hold 'x' and 'y', but got {sorted(split)}."
                )
            rows = {key: len(value) for key, value in split.items()}
            if len(set(rows.values())) != 1 or not rows["x"]:
                raise ValueError(
                    f"splits[{name!r}] must hold tensors with one row per sample, at least one, "
                    f"but got {rows} rows."
                )

    def split(self, name: str) -> Split:
        """Return a split by name.

        Raises:
            ValueError: there is no such split.
        """
        if name not in self.splits:
            raise ValueError(f"unknown split {name!r}; {did_you_mean(name, self.splits)}")
        return self.splits[name]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample; (channels, height, width) for images."""
        return tuple(self.splits["train"]["x"].shape[1:])

    @property
    def is_image(self) -> bool:
        """Whether a sample is an image, so that shifting it makes sense."""
        return len(self.input_shape) == 3

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the inputs, and so of the weights trained on them."""
        return self.splits["train"]["x"].dtype

    @property
    def device(self) -> torch.device:
        """Where the data are, and so the weights trained on them."""
        return self.splits["train"]["x"].device

    @abstractmethod
    def measure(self, outputs: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return metrics of each sample, "loss" among them, from a network's outputs."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the type, name, floating type, options and every byte of every split."""
        digest = hashlib.sha256()
        head = [type(self).__name__, self.name, str(self.dtype), sorted(self.options.items())]
        digest.update(json.dumps(head).encode())
        for name, split in sorted(self.splits.items()):
            for key, value in sorted(split.items()):
                digest.update(f"{name}/{key}/{value.dtype}/{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def to(
        self: TaskT, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> TaskT:
        """Return the task with floating tensors in `dtype` and all tensors on `device`."""

        def move(value: Tensor) -> Tensor:
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        splits = {n: {k: move(v) for k, v in split.items()} for n, split in self.splits.items()}
        return dataclasses.replace(self, splits=splits)


@dataclass(frozen=True, eq=False)
class Classification(Task):
    """A task whose "y" is a class index; scored by cross entropy and accuracy.

    Attributes:
        n_classes: labels are 0 ... n_classes − 1.
        corrupted: True for each training sample whose label was replaced by a wrong one.
            Known to the experimenter, never shown to a learner.
    """

    n_classes: int = field(kw_only=True)
    corrupted: Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_classes < 2:
            raise ValueError(f"n_classes must be at least 2, but got {self.n_classes}.")
        for name, split in self.splits.items():
            low, high = int(split["y"].min()), int(split["y"].max())
            if low < 0 or high >= self.n_classes:
                raise ValueError(
                    f"splits[{name!r}]['y'] must lie in 0 ... {self.n_classes - 1}, "
                    f"but got {low} ... {high}."
                )
        if self.corrupted.shape != self.splits["train"]["y"].shape:
            raise ValueError(
                f"corrupted must have one entry per training sample, shape "
                f"{tuple(self.splits['train']['y'].shape)}, but got {tuple(self.corrupted.shape)}."
            )

    def measure(self, outputs: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return "loss" (cross entropy in nats) and "accuracy" of each sample.

        Args:
            outputs: logits, shape (batch, n_classes).
            batch: with "y", the class indices.
        """
        return {
            "loss": F.cross_entropy(outputs, batch["y"], reduction="none"),
            "accuracy": (outputs.argmax(dim=1) == batch["y"]).to(outputs.dtype),
        }
