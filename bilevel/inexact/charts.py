"""Coordinates θ that inexact methods move in: unconstrained ones, or a box with projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from bilevel.owners import as_grad
from bilevel.space import Space
from hypergrad.flat import FlatSpace

__all__ = ["Chart", "Coordinates"]

Coordinates = Literal["unconstrained", "box"]


@dataclass(frozen=True)
class Chart:
    """The map h = c(θ) from a flat vector θ (d,) to the gradient-owned hyperparameters.

    Unconstrained: the bijections of the space.  Box: θ = h on a linear scale and θ = log h on a
    log scale, and `project` puts θ back between the bounds, as projected gradient descent does.

    Attributes:
        space: the hyperparameters.
        kind: "unconstrained" or "box".
        names: of the hyperparameters, in the order of θ.
        flat: the vector space of θ.
    """

    space: Space
    kind: Coordinates
    names: tuple[str, ...]
    flat: FlatSpace

    @classmethod
    def of(cls, space: Space, kind: Coordinates, hparams: Mapping[str, Tensor]) -> Chart:
        """Return the chart of a space at values that give shapes and dtypes.

        Raises:
            ValueError: a simplex in a box.
        """
        z = space.coordinates(hparams)
        if kind == "box":
            for name in z:
                if as_grad(space[name]).scale == "simplex":
                    raise ValueError(
                        f"coordinates='box' cannot hold {name}, which lies on a simplex; use "
                        "'unconstrained'."
                    )
        return cls(space, kind, tuple(z), FlatSpace.of(list(z.values())))

    def theta(self, hparams: Mapping[str, Tensor]) -> Tensor:
        """Return θ with c(θ) = hparams."""
        if self.kind == "unconstrained":
            z = self.space.coordinates(hparams)
            return self.flat.pack([z[name] for name in self.names]).detach()
        values = [hparams[name] for name in self.names]
        logs = [as_grad(self.space[name]).scale == "log" for name in self.names]
        parts = [v.log() if log else v for v, log in zip(values, logs, strict=True)]
        return self.flat.pack(parts).detach()

    def constrain(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return c(θ) for θ cut into named tensors; differentiable."""
        if self.kind == "unconstrained":
            return self.space.constrain(parts)
        values = {}
        for name, part in parts.items():
            domain = as_grad(self.space[name])
            value = part.exp() if domain.scale == "log" else part
            low, high = domain.limits(value.dtype)
            if low is not None or high is not None:
                exact = value.detach()
                value = value + (exact.clamp(low, high) - exact)
            values[name] = value
        return values

    def hparams(self, theta: Tensor) -> dict[str, Tensor]:
        """Return c(θ), detached."""
        with torch.no_grad():
            return self.constrain(self.named(theta))

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """Return θ, or a direction in it, cut into named tensors."""
        pieces = self.flat.unpack(theta.detach())
        return {name: p.clone() for name, p in zip(self.names, pieces, strict=True)}

    def project(self, theta: Tensor) -> Tensor:
        """Return the nearest θ inside the bounds; θ itself where it is unconstrained."""
        if self.kind == "unconstrained":
            return theta
        parts = []
        for name, part in self.named(theta).items():
            domain = as_grad(self.space[name])
            low, high = domain.limits(part.dtype)
            if domain.scale == "log":
                low, high = (None if b is None else math.log(b) for b in (low, high))
            bounded = part if low is None and high is None else part.clamp(low, high)
            parts.append(bounded)
        return self.flat.pack(parts)

    def stretch(self, theta: Tensor) -> float:
        """Return ‖c'(θ)‖₂, which turns Lipschitz constants in h into those in θ."""
        largest = 0.0
        for name, part in self.named(theta).items():
            leaf = part.requires_grad_()
            if as_grad(self.space[name]).scale == "simplex":
                matrix = cast(
                    Tensor,
                    torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]
                        lambda p, name=name: self.constrain({name: p})[name], leaf
                    ),
                )
                flat = matrix.reshape(-1, leaf.numel())
                size = float(torch.linalg.matrix_norm(flat, 2))
            else:
                value = self.constrain({name: leaf})[name]
                (slope,) = torch.autograd.grad(value.sum(), leaf)
                size = float(slope.abs().max())
            largest = max(largest, size)
        return largest
