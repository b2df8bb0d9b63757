"""What a projector works on: the parts of the flat vector, and its contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

__all__ = ["Part", "Projector", "Support", "generator", "offsets"]

Support = dict[str, Tensor]
"""The subspace: indices (integers), and bases (floating) that derivatives pass through."""


@dataclass(frozen=True)
class Part:
    """One trained tensor within the flat vector.

    Attributes:
        shape: of the tensor.
        split: whether it is projected; the others are updated in full.
        marked: whether `Split.marked_scale` scales its step.
    """

    shape: tuple[int, ...]
    split: bool = True
    marked: bool = False

    @property
    def size(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape as a matrix: all but the first dimension flattened."""
        return self.shape[0], self.size // self.shape[0]


def offsets(parts: Sequence[Part]) -> Iterator[tuple[int, Part]]:
    """Yield where each part starts, and the part."""
    start = 0
    for part in parts:
        yield start, part
        start += part.size


class Projector(ABC):
    """A subspace of the flat vector; subclasses are frozen dataclasses.

    ``up(down(g)) + rest = g`` with a rest that is orthogonal to the subspace.
    """

    def check(self, parts: Sequence[Part]) -> None:
        """Check that the settings fit the parts, before any gradient is known.

        Raises:
            ValueError: they do not, or no part is split.
        """
        if not any(part.split for part in parts):
            raise ValueError("parts: no trained tensor is split.")

    @abstractmethod
    def fit(
        self, parts: Sequence[Part], g: Tensor, w: Tensor, count: int, before: Support | None
    ) -> Support:
        """Choose the subspace.

        Args:
            parts: of the flat vector.
            g: gradient (with the error feedback), flat.
            w: weights, flat.
            count: of earlier choices; with the projector's seed it decides random draws.
            before: the subspace so far; None at first.

        Raises:
            ValueError: no subspace at all.
        """

    @abstractmethod
    def down(self, parts: Sequence[Part], support: Support, g: Tensor) -> Tensor:
        """Return the coordinates of a flat vector in the subspace, a vector."""

    @abstractmethod
    def up(self, parts: Sequence[Part], support: Support, a: Tensor) -> Tensor:
        """Return the flat vector of coordinates in the subspace."""

    @abstractmethod
    def move(
        self, parts: Sequence[Part], before: Support, after: Support, a: Tensor, square: bool
    ) -> Tensor:
        """Carry moments from one subspace to the next.

        Args:
            parts: of the flat vector.
            before: the subspace of `a`.
            after: the next one.
            a: a moment, or a count of steps.
            square: whether it is one of squares, which stay non-negative.
        """


def generator(seed: int, count: int) -> torch.Generator:
    """Return the generator of one choice of a random subspace."""
    return torch.Generator().manual_seed((seed * 1_000_003 + count) % 2**63)
