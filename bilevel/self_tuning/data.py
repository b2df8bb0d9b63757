"""Batches of a network's splits, addressed by number so that a resumed run sees the same ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.single_loop.draws import chance

__all__ = ["Data", "Split", "Stream", "rows_of", "warn_of_same_data"]

Split = Mapping[str, Tensor] | Sequence[Any]
"""Tensors with one row per sample, or a list of batches."""

Data = Split | Callable[[int], Any]
"""Tensors with one row per sample, a list of batches, or a stream t -> batch."""


def rows_of(batch: Any) -> int:
    """Return the number of examples: the first dimension of the batch's first tensor.

    Raises:
        ValueError: the batch holds no tensor with a dimension.
    """
    for leaf in optree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise ValueError(f"a batch must hold a tensor with one row per example, but got {batch!r}.")


class Stream:
    """Endless batches of one split, the t-th a function of t and the seed.

    Tensors are drawn without replacement, in a new order each epoch; what is left over at its
    end, too little for a batch, waits for another epoch.  Lists go round.

    Args:
        name: for messages.
        data: see `Data`.
        size: rows of a batch of tensors; None for all.
        seed: of the order.

    Raises:
        ValueError: an empty split, rows that differ between tensors, or a size below 1.
    """

    def __init__(self, name: str, data: Data, size: int | None, seed: int) -> None:
        self.name, self.data, self._seed = name, data, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        if size is not None and size < 1:
            raise ValueError(f"batch_size must be at least 1, but got {size}.")
        if isinstance(data, Mapping):
            lengths = {key: len(value) for key, value in data.items()}
            if not lengths or len(set(lengths.values())) > 1 or not min(lengths.values()):
                raise ValueError(
                    f"{name} must hold tensors with the same positive number of rows, but got "
                    f"{lengths}."
                )
            self._rows = next(iter(lengths.values()))
            self._size = min(size or self._rows, self._rows)
        elif not callable(data) and not len(data):
            raise ValueError(f"{name} must hold at least one batch, but got an empty list.")

    def __call__(self, t: int) -> Any:
        """Return batch t."""
        if callable(self.data):
            return self.data(t)
        if not isinstance(self.data, Mapping):
            return self.data[t % len(self.data)]
        if self._size == self._rows:
            return dict(self.data)
        per_epoch = self._rows // self._size
        epoch, i = divmod(t, per_epoch)
        if epoch != self._epoch:
            seed = chance(self._seed, epoch).getrandbits(62)
            generator = torch.Generator().manual_seed(seed)
            self._order, self._epoch = torch.randperm(self._rows, generator=generator), epoch
        index = self._order[i * self._size : (i + 1) * self._size]
        return {key: value[index.to(value.device)] for key, value in self.data.items()}

    def whole(self, size: int) -> Iterator[Any]:
        """Yield the whole split once.

        Raises:
            ValueError: a stream, which has no end.
        """
        if callable(self.data):
            raise ValueError(
                f"{self.name} is a stream of batches, so it cannot be evaluated as a whole; pass "
                "tensors or a list of batches."
            )
        if not isinstance(self.data, Mapping):
            yield from self.data
            return
        for start in range(0, self._rows, size):
            yield {key: value[start : start + size] for key, value in self.data.items()}


def warn_of_same_data(train: Data, val: Data) -> None:
    """Warn where training and validation data share a tensor."""
    same = train is val
    if isinstance(train, Mapping) and isinstance(val, Mapping):
        theirs = {value.data_ptr() for value in val.values()}
        same = same or any(value.data_ptr() in theirs for value in train.values())
    if same:
        warnings.warn(
            "train and val are the same data: hyperparameters tuned on it fit the training set, "
            "and every regularizer goes to zero.",
            stacklevel=3,
        )
