"""An endless stream of batches from one split, as explicit state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapters.tasks import Split

__all__ = ["Stream"]


class Stream:
    """Draws batches without replacement, by default in a new random order each epoch.

    A batch holds the rows of every tensor of the split, "index" (their row numbers) and "seed"
    (an int for every random draw of a loss on this batch).  Samples left over at the end of an
    epoch, too few for a batch, are dropped; the next epoch shuffles anew, so that over time no
    sample is preferred.

    Args:
        split: tensors with one row per sample.
        seed: decides every order and every batch seed.
        shuffle: whether to draw in a new order each epoch; otherwise in the order of the split.
    """

    def __init__(self, split: Split, seed: int, shuffle: bool = True) -> None:
        self.split = split
        self._shuffle = shuffle
        self._rows = len(split["x"])
        self._device = split["x"].device
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0

    def draw(self, size: int) -> dict[str, Any]:
        """Return the next batch: `size` samples, or all of them where there are fewer.

        Raises:
            ValueError: size is not positive.
        """
        if size < 1:
            raise ValueError(f"batch size must be at least 1, but got {size}.")
        size = min(size, self._rows)
        if self._position + size > len(self._order):
            self._order = (
                torch.randperm(self._rows, generator=self._generator)
                if self._shuffle
                else torch.arange(self._rows)
            )
            self._position = 0
        index = self._order[self._position : self._position + size].to(self._device)
        self._position += size
        seed = int(torch.randint(2**62, (), generator=self._generator))
        return {**{k: v[index] for k, v in self.split.items()}, "index": index, "seed": seed}

    def state_dict(self) -> dict[str, Any]:
        """Return what decides all later batches."""
        return {
            "generator": self._generator.get_state(),
            "order": self._order,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""
        self._generator.set_state(state["generator"])
        self._order = state["order"]
        self._position = state["position"]
