"""First and second derivatives of a nested problem at a point, on one batch, counted.

A point is a dict of flat vectors: "w", the trained tensors; "z", the unconstrained coordinates
of the hyperparameters, h = c(z); and, where an algorithm keeps it, "v", the adjoint.  A set of
directions is a dict of the same keys.  Differentiating through c gives derivatives in z.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel.inner import Inner
from bilevel.metrics import Cost
from hypergrad.flat import FlatSpace
from hypergrad.operators import vector_jacobian
from hypergrad.outer import outer_gradients
from hypergrad.problem import inner_gradient
from hypergrad.tree import Leaves, Tree, trainable_leaves, zeros_for_none

__all__ = ["Linearized", "Oracle", "Vectors", "average", "mean", "plus"]

Vectors = dict[str, Tensor]
"""Flat vectors by variable: "w", "z", "v"."""


def plus(a: Vectors, b: Vectors, scale: float = 1.0) -> Vectors:
    """Return a + scale · b; a key that one lacks counts as zero there."""
    total = dict(a)
    for name, vector in b.items():
        total[name] = total[name] + scale * vector if name in total else scale * vector
    return total


def mean(items: Sequence[Vectors]) -> Vectors:
    """Return the average of several sets of vectors."""
    return {name: torch.stack([item[name] for item in items]).mean(0) for name in items[0]}


@dataclass(frozen=True)
class Linearized:
    """∇_w f at a point, and products with its derivative.

    Attributes:
        gradient: ∇_w f.
        products: (v, which) -> the products named in `which` among "w", ∇²_ww f v, and "z",
            (∂²f/∂w∂z)ᵀ v, by one double backward.
    """

    gradient: Tensor
    products: Callable[[Tensor, tuple[str, ...]], Vectors]

    def hvp(self, v: Tensor) -> Tensor:
        """Return ∇²_ww f v."""
        return self.products(v, ("w",))["w"]

    def cross(self, v: Tensor) -> Tensor:
        """Return (∂²f/∂w∂z)ᵀ v."""
        return self.products(v, ("z",))["z"]


def average(parts: Sequence[Linearized]) -> Linearized:
    """Return the linearization of the average of several losses at one point."""
    return Linearized(
        torch.stack([part.gradient for part in parts]).mean(0),
        lambda v, which: mean([part.products(v, which) for part in parts]),
    )


@dataclass
class _Losses:
    """Average of the values seen at the latest point."""

    at: Vectors | None = None
    values: list[float] = field(default_factory=list)

    def add(self, x: Vectors, value: Tensor) -> None:
        if x is not self.at:
            self.at, self.values = x, []
        self.values.append(float(value))

    @property
    def average(self) -> float:
        return sum(self.values) / len(self.values)


class Oracle:
    """Evaluates an inner level's losses at points of its flat variables.

    Attributes:
        gradients: gradient evaluations so far, of f and of F.
        hvps: double backwards so far; one gives H v, a cross product, or both.
        reached: hyperparameters that a derivative has arrived at.
        inner_losses: f at the latest point.
        outer_losses: F at the latest point.
    """

    def __init__(self, inner: Inner, z: Mapping[str, Tensor]) -> None:
        self._problem, self._domains = inner.problem, inner.space
        self._params, self._names = trainable_leaves(inner.params), list(z)
        self._w = FlatSpace.of(self._params.tensors)
        self._z = FlatSpace.of(list(z.values()))
        self.start: Vectors = {
            "w": self._w.pack(self._params.tensors).detach(),
            "z": self._z.pack(list(z.values())),
        }
        self.gradients = self.hvps = 0
        self.reached: set[str] = set()
        self.inner_losses, self.outer_losses = _Losses(), _Losses()

    def cost(self, steps: int) -> Cost:
        """Return the work so far."""
        return Cost(steps=steps, gradients=self.gradients, hvps=self.hvps)

    def params(self, x: Vectors) -> Tree:
        """Return the tree of weights at a point."""
        return self._params.rebuild(_leaves(self._w, x["w"]))

    def named(self, z: Tensor) -> dict[str, Tensor]:
        """Return a vector of coordinates, or a direction in them, by hyperparameter."""
        pieces = self._z.unpack(z.detach())
        return {n: piece.clone() for n, piece in zip(self._names, pieces, strict=True)}

    def slope(self, x: Vectors, batch: Any) -> Tensor:
        """Return ∇_w f, without second derivatives."""
        self.gradients += 1
        w, z = self._at(x)
        value, gradient = inner_gradient(self._problem, w, z, batch, create_graph=False)
        self.inner_losses.add(x, value)
        return self._w.pack(gradient)

    def linearize(self, x: Vectors, batch: Any) -> Linearized:
        """Return ∇_w f and products with its derivative."""
        self.gradients += 1
        w, z = self._at(x)
        value, gradient = inner_gradient(self._problem, w, z, batch)
        self.inner_losses.add(x, value)

        def products(v: Tensor, which: tuple[str, ...]) -> Vectors:
            self.hvps += 1
            leaves = {"w": w.tensors, "z": z.tensors}
            found = vector_jacobian(
                gradient, [leaf for name in which for leaf in leaves[name]], self._w.unpack(v)
            )
            pieces = {"w": found[: len(w.tensors)] if "w" in which else []}
            pieces["z"] = found[len(pieces["w"]) :]
            self._mark(pieces["z"])
            spaces = {"w": self._w, "z": self._z}
            return {n: spaces[n].pack(zeros_for_none(pieces[n], leaves[n])) for n in which}

        return Linearized(self._w.pack([g.detach() for g in gradient]), products)

    def outer(self, x: Vectors, batch: Any) -> Vectors:
        """Return ∇_w F as "w" and the direct ∇_z F as "z"."""
        self.gradients += 1
        w, z = self._at(x)
        value, in_w, in_z = outer_gradients(self._problem, w, z, batch)
        self.outer_losses.add(x, value)
        self._mark(in_z)
        return {"w": self._w.pack(in_w), "z": self._z.pack(zeros_for_none(in_z, z.tensors))}

    def _at(self, x: Vectors) -> tuple[Leaves, Leaves]:
        w = Leaves(_leaves(self._w, x["w"]), self._params.names, self._params.rebuild)
        names, constrain = self._names, self._domains.constrain
        shown = [f"hparams[{name!r}]" for name in names]
        z = Leaves(
            _leaves(self._z, x["z"]),
            shown,
            lambda values: constrain(dict(zip(names, values, strict=True))),
        )
        return w, z

    def _mark(self, found: Sequence[Tensor | None]) -> None:
        if found:
            pairs = zip(self._names, found, strict=True)
            self.reached |= {name for name, piece in pairs if piece is not None}


def _leaves(space: FlatSpace, vector: Tensor) -> list[Tensor]:
    """Return the tensors of a vector as autograd leaves that own their memory."""
    return [piece.detach().clone().requires_grad_() for piece in space.unpack(vector)]
