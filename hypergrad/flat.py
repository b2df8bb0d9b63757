"""Flat vectors: the tensors of a tree, concatenated in one dtype wide enough to solve in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

__all__ = ["FlatSpace"]


@dataclass(frozen=True)
class FlatSpace:
    """The vector space of a list of tensors, and the two maps between them.

    Attributes:
        shapes: of the tensors.
        dtypes: of the tensors.
        dtype: of the vectors: the widest of `dtypes`, at least float32.  Sums over many
            entries lose all digits in bfloat16 and float16, so no vector is ever kept in them.
    """

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> FlatSpace:
        """Return the space that `tensors` live in."""
        dtypes = tuple(t.dtype for t in tensors)
        dtype = reduce(torch.promote_types, dtypes, torch.float32)
        return cls(tuple(t.shape for t in tensors), dtypes, dtype)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate tensors of this space into a vector."""
        return torch.cat([t.reshape(-1) for t in tensors]).to(self.dtype)

    def unpack(self, vector: Tensor) -> list[Tensor]:
        """Cut a vector into tensors of this space, in their own dtypes."""
        pieces = torch.split(vector, [shape.numel() for shape in self.shapes])
        return [
            piece.view(shape).to(dtype)
            for piece, shape, dtype in zip(pieces, self.shapes, self.dtypes, strict=True)
        ]
