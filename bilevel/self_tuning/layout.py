"""The vector λ of unconstrained hyperparameters: its columns, its perturbation, its values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from bilevel.checks import did_you_mean
from bilevel.coordinates import constrain, coordinate, coordinate_shape
from bilevel.domains import Grad
from bilevel.owners import as_grad
from bilevel.space import Space

__all__ = ["MAX_SIZE", "Layout"]

MAX_SIZE = 256
"""Most elements of λ.  A response has rank one in each output row, whatever their number."""


@dataclass(frozen=True)
class Layout:
    """Which columns of λ belong to which hyperparameter.

    Attributes:
        domains: smooth domain of each gradient-owned name, in order.
        per_batch: names that have one perturbation per minibatch, not one per example.
        integers: names whose values are rounded to the nearest integer.
    """

    domains: Mapping[str, Grad]
    per_batch: frozenset[str] = frozenset()
    integers: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        space: Space,
        names: Collection[str],
        per_batch: Collection[str] = (),
        integers: Collection[str] = (),
    ) -> Layout:
        """Return the layout of the gradient-owned `names` of a space.

        Raises:
            ValueError: no name; `per_batch` or `integers` name something else; a domain with
                knots; more than `MAX_SIZE` elements.
        """
        if not names:
            raise ValueError(
                f"space: the gradient owns none of the active hyperparameters of {list(space)}, so "
                "there is nothing to tune; see Space.own."
            )
        for what, given in (("per_batch", per_batch), ("integers", integers)):
            if isinstance(given, str):
                raise TypeError(f"{what} must be a collection of names, but got {given!r}.")
            for name in given:
                if name not in names:
                    raise ValueError(
                        f"{what}: {name!r} is not owned by the gradient; "
                        f"{did_you_mean(name, names)}"
                    )
        domains = {name: as_grad(space[name]) for name in names}
        for name, domain in domains.items():
            if domain.schedule is not None:
                raise ValueError(
                    f"{name} has a schedule of {domain.schedule} knots; self-tuning finds a "
                    "schedule by itself, so declare it without one."
                )
        layout = cls(domains, frozenset(per_batch), frozenset(integers))
        if layout.size > MAX_SIZE:
            sizes = {name: prod(coordinate_shape(d)) for name, d in domains.items()}
            raise ValueError(
                f"self-tuning takes at most {MAX_SIZE} hyperparameters, but got {layout.size}: "
                f"{sizes}.  Its response has rank one in each output row and cannot follow one "
                "penalty per weight; tune those with Descent, or fix them with space.fix(...)."
            )
        return layout

    @property
    def sizes(self) -> list[int]:
        """Number of columns of each name."""
        return [prod(coordinate_shape(domain)) for domain in self.domains.values()]

    @property
    def size(self) -> int:
        """n, the length of λ."""
        return sum(self.sizes)

    @property
    def columns(self) -> dict[str, slice]:
        """Columns by name."""
        found, start = {}, 0
        for name, size in zip(self.domains, self.sizes, strict=True):
            found[name] = slice(start, start + size)
            start += size
        return found

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the vector, shape (n,), of coordinates (or slopes) by name."""
        return torch.cat([parts[name].reshape(-1) for name in self.domains])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the parts of a vector by name, in the shapes of coordinates."""
        pieces = torch.split(vector, self.sizes)
        return {
            name: piece.reshape(coordinate_shape(domain))
            for (name, domain), piece in zip(self.domains.items(), pieces, strict=True)
        }

    def coordinates(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return λ at constrained values, shape (n,)."""
        return self.join({n: coordinate(d, values[n]) for n, d in self.domains.items()})

    def spread(self, per_name: float | Mapping[str, float], like: Tensor) -> Tensor:
        """Return one number for each column, shape (n,), from one for all or one for each name.

        Raises:
            ValueError: a mapping that does not name each hyperparameter.
        """
        if not isinstance(per_name, Mapping):
            return torch.full_like(like, float(per_name))
        if set(per_name) != set(self.domains):
            raise ValueError(f"expected one number for each of {list(self.domains)}, "
                             f"but got {dict(per_name)}.")  # fmt: skip
        full = [torch.full((s,), float(per_name[n])) for n, s in zip(self.domains, self.sizes,
                                                                     strict=True)]  # fmt: skip
        return torch.cat(full).to(like)

    def noise(self, rows: int | None, generator: torch.Generator, like: Tensor) -> Tensor:
        """Return standard normal draws: shape (rows, n), or (n,) where rows is None.

        Columns of `per_batch` names are equal in all rows.
        """
        if rows is None:
            return torch.randn(self.size, generator=generator).to(like)
        draws = torch.randn(rows, self.size, generator=generator)
        for name in self.per_batch:
            draws[:, self.columns[name]] = draws[:1, self.columns[name]]
        return draws.to(like)

    def values(self, coordinates: Tensor) -> dict[str, Any]:
        """Return constrained values by name; differentiable except where rounded.

        Args:
            coordinates: shape (n,), or (rows, n) for one vector per example.

        Returns:
            A value of shape (rows, *shape) for each name, or (*shape) for coordinates of shape
            (n,) and for `per_batch` names.
        """
        found: dict[str, Any] = {}
        pieces = torch.split(coordinates, self.sizes, dim=-1)
        for (name, domain), piece in zip(self.domains.items(), pieces, strict=True):
            point = piece[0] if piece.dim() == 2 and name in self.per_batch else piece
            z = point.reshape((*point.shape[:-1], *coordinate_shape(domain)))
            found[name] = self.round(name, constrain(domain, z))
        return found

    def round(self, name: str, value: Tensor) -> Tensor:
        """Return the value, rounded where the name is an integer."""
        return value.round() if name in self.integers else value
