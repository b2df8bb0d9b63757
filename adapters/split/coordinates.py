"""Subspaces of single entries: chosen by a score, whole rows or columns, or whole tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapters.select import slices, top_k
from adapters.split.layout import Part, Projector, Support, generator, offsets

__all__ = ["Blocks", "Coordinates", "Fixed", "Slices"]


@dataclass(frozen=True)
class _Entries(Projector):
    """A set of entries: gather, scatter."""

    def fit(
        self, parts: Sequence[Part], g: Tensor, w: Tensor, count: int, before: Support | None
    ) -> Support:
        mask = torch.zeros_like(w, dtype=torch.bool)
        old = torch.ones_like(mask)
        if before is not None:
            old = torch.zeros_like(mask)
            old[before["index"]] = True
        for (start, part), kept in zip(
            offsets(parts), self._choose(parts, w.detach(), old, count), strict=True
        ):
            piece = slice(start, start + part.size)
            mask[piece] = True if kept is None else kept.reshape(-1)
        if not mask.any():
            raise ValueError(f"{self} chooses no entry at all, so nothing would be trained.")
        return {"index": mask.nonzero()[:, 0]}

    @abstractmethod
    def _choose(
        self, parts: Sequence[Part], w: Tensor, old: Tensor, count: int
    ) -> list[Tensor | None]:
        """Return a mask of each part; None for all of it.

        Args:
            parts: see `fit`.
            w: see `fit`.
            old: mask of the entries so far, all of them at first.
            count: see `fit`.
        """

    def down(self, parts: Sequence[Part], support: Support, g: Tensor) -> Tensor:
        return g[support["index"]]

    def up(self, parts: Sequence[Part], support: Support, a: Tensor) -> Tensor:
        size = sum(part.size for part in parts)
        return a.new_zeros(size).index_copy(0, support["index"], a)

    def move(
        self, parts: Sequence[Part], before: Support, after: Support, a: Tensor, square: bool
    ) -> Tensor:
        return self.up(parts, before, a)[after["index"]]


@dataclass(frozen=True)
class Coordinates(_Entries):
    """The best entries of each split tensor by a score of its weights.

    Attributes:
        score: ``(matrix) -> score`` of the same shape; None for random entries.
        count: ``(matrix) -> number of entries``, at most all of them.
        largest: whether large scores are good.
        shrink: whether later choices lie within the first one.
        seed: of random entries.
    """

    score: Callable[[Tensor], Tensor] | None
    count: Callable[[Tensor], int]
    largest: bool = True
    shrink: bool = False
    seed: int = 0

    def _choose(
        self, parts: Sequence[Part], w: Tensor, old: Tensor, count: int
    ) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        draws = generator(self.seed, count)
        for start, part in offsets(parts):
            if not part.split:
                found.append(None)
                continue
            matrix = w[start : start + part.size].view(part.matrix)
            if self.score is None:
                score = torch.rand(part.matrix, generator=draws).to(w.device)
            else:
                score = self.score(matrix)
            kept = top_k(score, min(self.count(matrix), part.size), largest=self.largest)
            if self.shrink:
                kept &= old[start : start + part.size].view(part.matrix)
            found.append(kept)
        return found


@dataclass(frozen=True, eq=False)
class Fixed(_Entries):
    """Given entries.

    Attributes:
        masks: for each split tensor in order.
    """

    masks: Sequence[Tensor]

    def check(self, parts: Sequence[Part]) -> None:
        super().check(parts)
        split = [part.size for part in parts if part.split]
        given = [mask.numel() for mask in self.masks]
        if given != split:
            raise ValueError(
                f"masks must have as many entries as the split tensors, {split}, but got {given}."
            )

    def _choose(
        self, parts: Sequence[Part], w: Tensor, old: Tensor, count: int
    ) -> list[Tensor | None]:
        masks = iter(self.masks)
        return [next(masks).to(w.device) if part.split else None for part in parts]


@dataclass(frozen=True)
class Slices(_Entries):
    """Random rows, columns or entries of each split tensor.

    Attributes:
        density: share in [0, 1], rounded down in each tensor.
        dim: "rows", "columns" or "entries".
        seed: of the draws.
    """

    density: float
    dim: Literal["rows", "columns", "entries"] = "columns"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise ValueError(f"density must lie in [0, 1], but got {self.density}.")
        if self.dim not in ("rows", "columns", "entries"):
            raise ValueError(f"dim must be 'rows', 'columns' or 'entries', but got {self.dim!r}.")

    def _choose(
        self, parts: Sequence[Part], w: Tensor, old: Tensor, count: int
    ) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        draws = generator(self.seed, count)
        for part in parts:
            if not part.split:
                found.append(None)
            elif self.dim == "entries":
                score = torch.rand(part.matrix, generator=draws).to(w.device)
                found.append(top_k(score, int(self.density * part.size)))
            else:
                dim = 0 if self.dim == "rows" else 1
                score = torch.rand(part.matrix[dim], generator=draws)
                score = score[:, None] if dim == 0 else score[None]
                score = score.expand(part.matrix).to(w.device)
                found.append(slices(score, int(self.density * part.matrix[dim]), dim))
        return found


@dataclass(frozen=True)
class Blocks(_Entries):
    """Whole tensors: round(density · number) of the split ones, in turn or at random.

    Attributes:
        density: share of the split tensors in [0, 1]; above 0 it is at least one tensor.
        order: "random", "ascending" or "descending".
        seed: of the draws.
    """

    density: float
    order: Literal["random", "ascending", "descending"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise ValueError(f"density must lie in [0, 1], but got {self.density}.")
        if self.order not in ("random", "ascending", "descending"):
            raise ValueError(
                f"order must be 'random', 'ascending' or 'descending', but got {self.order!r}."
            )

    def _choose(
        self, parts: Sequence[Part], w: Tensor, old: Tensor, count: int
    ) -> list[Tensor | None]:
        total = sum(part.split for part in parts)
        active = max(round(self.density * total), int(self.density > 0))
        if self.order == "random":
            order = torch.randperm(total, generator=generator(self.seed, count)).tolist()
        else:
            first = count * active
            order = [(first + i) % total for i in range(total)] if total else []
            if self.order == "descending":
                order = [total - 1 - i for i in order]
        chosen, number = set(order[:active]), 0
        found: list[Tensor | None] = []
        for part in parts:
            if not part.split:
                found.append(None)
                continue
            kept = torch.full(part.shape, number in chosen, device=w.device)
            found.append(kept)
            number += 1
        return found
