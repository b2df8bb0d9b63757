"""The directions that stochastic bilevel algorithms move along, on one sample of batches.

With v standing for the adjoint -(∇²_ww f)⁻¹ ∇_w F, the three directions of Dagréou et al. 2022 are

    d_w = ∇_w f,    d_v = ∇²_ww f v + ∇_w F,    d_z = ∇_z F + (∂²f/∂w∂z)ᵀ v.

They are linear in f and F, so that averages over batches are exact, and all vanish together
where w = w*(h), v solves its linear system, and dF/dz = 0.  Algorithms without a v of their own
replace it by a Neumann series at each point.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from bilevel.single_loop.draws import Sample
from bilevel.single_loop.finite import FiniteInner
from bilevel.single_loop.neumann import Neumann
from bilevel.single_loop.oracle import Oracle, Vectors, average, mean, plus

__all__ = [
    "full_hypergradient",
    "full_joint",
    "hypergradient",
    "inner_part",
    "joint",
    "outer_part",
    "sgd_adjoint",
]


def inner_part(oracle: Oracle, x: Vectors, batch: Any) -> Vectors:
    """Return what f adds to the three directions: ∇_w f, ∇²_ww f v, (∂²f/∂w∂z)ᵀ v."""
    at = oracle.linearize(x, batch)
    products = at.products(x["v"], ("w", "z"))
    return {"w": at.gradient, "v": products["w"], "z": products["z"]}


def outer_part(oracle: Oracle, x: Vectors, batch: Any) -> Vectors:
    """Return what F adds to the three directions: 0, ∇_w F, ∇_z F."""
    gradient = oracle.outer(x, batch)
    return {"v": gradient["w"], "z": gradient["z"]}


def full_joint(oracle: Oracle, x: Vectors, inner: FiniteInner) -> Vectors:
    """Return the three directions of the average losses."""
    of_f = mean([inner_part(oracle, x, batch) for batch in inner.inner_batch_list()])
    return plus(of_f, mean([outer_part(oracle, x, batch) for batch in inner.outer_batch_list()]))


def joint(oracle: Oracle, x: Vectors, sample: Sample) -> Vectors:
    """Return the three directions on a sample."""
    return plus(inner_part(oracle, x, sample.inner), outer_part(oracle, x, sample.outer))


def sgd_adjoint(
    oracle: Oracle, x: Vectors, gradient: Tensor, batches: Iterable[Any], lr: float
) -> Tensor:
    """Return v after SGD steps v ← v - lr (∇²_ww f v + ∇_w F), one for each batch of f."""
    v = x["v"]
    for batch in batches:
        v = v - lr * (oracle.linearize(x, batch).hvp(v) + gradient)
    return v


def hypergradient(
    oracle: Oracle, x: Vectors, sample: Sample, neumann: Neumann, lr: float
) -> Vectors:
    """Return ∇_w f as "w" and ∇_z F + (∂²f/∂w∂z)ᵀ v as "z", with v from a Neumann series."""
    gradient = oracle.outer(x, sample.outer)
    points = (oracle.linearize(x, batch) for batch in sample.neumann)
    v = neumann.adjoint(points, gradient["w"], lr)
    at = oracle.linearize(x, sample.inner)
    return {"w": at.gradient, "z": gradient["z"] + at.cross(v)}


def full_hypergradient(
    oracle: Oracle, x: Vectors, inner: FiniteInner, neumann: Neumann, factors: int, lr: float
) -> Vectors:
    """Return `hypergradient` of the average losses, with all batches in each factor."""
    gradient = mean([oracle.outer(x, batch) for batch in inner.outer_batch_list()])
    at = average([oracle.linearize(x, batch) for batch in inner.inner_batch_list()])
    v = neumann.adjoint([at] * factors, gradient["w"], lr)
    return {"w": at.gradient, "z": gradient["z"] + at.cross(v)}
