"""Subspaces spanned by orthonormal vectors: singular vectors, columns of a DCT, random ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from adapters.split.layout import Part, Projector, Support, generator, offsets

__all__ = ["Basis", "dct_matrix"]

Kind = Literal["svd", "dct", "random"]
Side = Literal["smaller", "larger", "left", "right"]


@dataclass(frozen=True)
class Basis(Projector):
    """r directions on one side of each split matrix: G Q (m × r) right, or Qᵀ G (r × n) left.

    Attributes:
        rank: r of each split tensor; a function of the matrix shape, or one number.
        kind: "svd", the top singular vectors of the gradient (GaLore); "dct", those r columns of
            one fixed DCT-II matrix along which it is largest (DCT-AdamW); "random" orthonormal.
        norm: of the columns of "dct": 1, or 2, which gives the best r columns of the matrix.
        seed: of "random".
        side: on which r directions are chosen: "smaller", which is right where m ≥ n (GaLore),
            "larger", "left" or "right".
    """

    rank: int | float
    kind: Kind = "svd"
    norm: int = 1
    seed: int = 0
    side: Side = "smaller"

    def __post_init__(self) -> None:
        if self.side not in ("smaller", "larger", "left", "right"):
            raise ValueError(
                f"side must be 'smaller', 'larger', 'left' or 'right', but got {self.side!r}."
            )
        if self.kind not in ("svd", "dct", "random"):
            raise ValueError(f"kind must be 'svd', 'dct' or 'random', but got {self.kind!r}.")
        if self.norm not in (1, 2):
            raise ValueError(f"norm must be 1 or 2, but got {self.norm}.")
        if isinstance(self.rank, float) and not 0 < self.rank <= 1:
            raise ValueError(f"rank as a share must lie in (0, 1], but got {self.rank}.")
        if isinstance(self.rank, int) and self.rank < 1:
            raise ValueError(f"rank must be at least 1, but got {self.rank}.")

    def ranks(self, part: Part) -> int:
        """Return r of a part: `rank`, or that share of its smaller side.

        Raises:
            ValueError: it exceeds the smaller side.
        """
        side = min(part.matrix)
        r = self.rank if isinstance(self.rank, int) else max(1, round(self.rank * side))
        if r > side:
            raise ValueError(f"rank must be at most {side} for shape {part.shape}, but got {r}.")
        return r

    def check(self, parts: Sequence[Part]) -> None:
        super().check(parts)
        for part in parts:
            if part.split:
                self.ranks(part)

    def fit(
        self, parts: Sequence[Part], g: Tensor, w: Tensor, count: int, before: Support | None
    ) -> Support:
        support: Support = {}
        draws = generator(self.seed, count)
        for i, (start, part) in enumerate(offsets(parts)):
            if not part.split:
                continue
            r, matrix = self.ranks(part), self._turned(g[start : start + part.size], part)
            if self.kind == "dct":
                scores = matrix.detach() @ dct_matrix(matrix.shape[1]).to(matrix)
                sizes = scores.abs().sum(dim=0) if self.norm == 1 else scores.square().sum(dim=0)
                best = sizes.argsort(descending=True, stable=True)[:r]
                support[f"{i}"] = best.sort().values
            elif self.kind == "svd":
                if not matrix.isfinite().all():
                    raise FloatingPointError("a gradient is not finite, so it has no SVD.")
                _, _, vt = torch.linalg.svd(matrix, full_matrices=False)
                support[f"{i}"] = vt[:r].T
            else:
                drawn = torch.randn(matrix.shape[1], r, generator=draws, dtype=torch.float64)
                support[f"{i}"] = torch.linalg.qr(drawn).Q.to(matrix)
        return support

    def down(self, parts: Sequence[Part], support: Support, g: Tensor) -> Tensor:
        pieces = []
        for i, (start, part) in enumerate(offsets(parts)):
            piece = g[start : start + part.size]
            if part.split:
                q = self._vectors(support[f"{i}"], part, g)
                piece = (self._turned(piece, part) @ q).reshape(-1)
            pieces.append(piece)
        return torch.cat(pieces)

    def up(self, parts: Sequence[Part], support: Support, a: Tensor) -> Tensor:
        pieces, start = [], 0
        for i, part in enumerate(parts):
            if not part.split:
                pieces.append(a[start : start + part.size])
                start += part.size
                continue
            q = self._vectors(support[f"{i}"], part, a)
            rows, r = part.size // len(q), q.shape[1]
            whole = a[start : start + rows * r].view(rows, r) @ q.T
            pieces.append((whole if self._right(part) else whole.T).reshape(-1))
            start += rows * r
        return torch.cat(pieces)

    def move(
        self, parts: Sequence[Part], before: Support, after: Support, a: Tensor, square: bool
    ) -> Tensor:
        """m → m R, and v → v (R ⊙ R) for squares and counts, R = Q_beforeᵀ Q_after.

        (m R)² has the mean v (R ⊙ R) where coordinates do not correlate.  It is not negative, and a
        rotation within one subspace keeps a count.  For "dct" R only moves columns, and R ⊙ R = R.
        """
        pieces, start = [], 0
        for i, part in enumerate(parts):
            if not part.split:
                pieces.append(a[start : start + part.size])
                start += part.size
                continue
            old = self._vectors(before[f"{i}"], part, a)
            new = self._vectors(after[f"{i}"], part, a)
            if self.kind == "dct":
                rotation = (before[f"{i}"][:, None] == after[f"{i}"][None]).to(a)
            else:
                rotation = old.T @ new
            rows, r = part.size // len(old), old.shape[1]
            rotation = rotation.square() if square else rotation
            pieces.append((a[start : start + rows * r].view(rows, r) @ rotation).reshape(-1))
            start += rows * r
        return torch.cat(pieces)

    def _right(self, part: Part) -> bool:
        """Whether the directions are those of the columns."""
        m, n = part.matrix
        return {"smaller": m >= n, "larger": m < n, "left": False, "right": True}[self.side]

    def _turned(self, piece: Tensor, part: Part) -> Tensor:
        """Return a part as a matrix whose rows are projected."""
        matrix = piece.view(part.matrix)
        return matrix if self._right(part) else matrix.T

    def _vectors(self, kept: Tensor, part: Part, like: Tensor) -> Tensor:
        if self.kind != "dct":
            return kept
        return dct_matrix(part.matrix[int(self._right(part))]).to(like)[:, kept]


@lru_cache(maxsize=64)
def dct_matrix(n: int) -> Tensor:
    """Return the orthonormal DCT-II basis, shape (n, n), column k of frequency k, in float64.

    G Q is the DCT-II of the rows of G, as `scipy.fft.dct(G, norm="ortho")`.
    """
    k = torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * (2 * k[:, None] + 1) * k[None] / (2 * n)) * math.sqrt(2 / n)
    basis[:, 0] /= math.sqrt(2)
    return basis
