"""The sampler's view of a space: scalar dimensions with names that carry their condition.

A sampler sees ``width@arch=mlp`` for a name that exists under a condition, ``wd[0]``,
``wd[1]``, ... for a tensor owned one by one, and ``wd`` for a shared one.  The condition is
part of the name so that a stored value is never read as one under another condition.  Optuna,
Ray Tune and plain random sampling all go through this file.

A simplex of n elements has n - 1 dimensions u ∈ [0, 1]: with the remainder r₀ = 1,

    vᵢ = 1 - (1 - uᵢ)^(1/(n-1-i)),    pᵢ = rᵢ vᵢ,    rᵢ₊₁ = rᵢ (1 - vᵢ),    pₙ₋₁ = rₙ₋₁,

so independent uniform u give a uniform distribution on the simplex (stick breaking with the
quantiles of Beta(1, n-1-i), the marginals of a flat Dirichlet distribution).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from bilevel.checks import did_you_mean
from bilevel.conditions import Option
from bilevel.coordinates import coordinate_shape
from bilevel.declaration import Declaration
from bilevel.domains import Choice, Float, Grad, Int, Switch
from bilevel.values import checked, default

__all__ = ["Dimension", "Scalar", "assemble", "dimensions", "draw", "gather", "options", "scatter"]

Scalar = Float | Int | Choice | Switch


@dataclass(frozen=True)
class Dimension:
    """One number or option that a sampler sets.

    Attributes:
        label: the mangled name, unique in a space.
        name: the name in the space.
        domain: range and scale of this one number or option.
    """

    label: str
    name: str
    domain: Scalar


def dimensions(space: Declaration, name: str) -> Iterator[Dimension]:
    """Yield the dimensions of a sampled name, in row-major order of its elements."""
    domain = space[name]
    suffix = domain.condition.suffix
    if not isinstance(domain, Grad):
        yield Dimension(name + suffix, name, cast(Scalar, domain))
        return
    simplex = domain.scale == "simplex"
    # Both bounds are there, see Grad.refusal.
    low, high = (0.0, 1.0) if simplex else (cast(float, domain.low), cast(float, domain.high))
    scalar = Float(low, high, log=domain.scale == "log")
    if space.owner(name) == "shared" or not domain.value_shape:
        yield Dimension(name + suffix, name, scalar)
        return
    for index in itertools.product(*map(range, coordinate_shape(domain))):
        label = f"{name}[{','.join(map(str, index))}]{suffix}"
        yield Dimension(label, name, scalar)


def options(domain: Choice | Switch) -> tuple[Option, ...]:
    """Return the values of a domain without order."""
    return domain.values if isinstance(domain, Choice) else (False, True)


def assemble(space: Declaration, value_of: Callable[[Dimension], Any]) -> dict[str, Any]:
    """Return values of all active names, asking for each dimension that is active.

    Parents are asked before the names they decide; names that no sampler owns take their
    default.
    """
    result: dict[str, Any] = {}
    for name in space.order:
        domain = space[name]
        if not domain.condition.holds(result):
            continue
        if name not in space.sampled:
            value = default(space, name)
        else:
            numbers = [value_of(dimension) for dimension in dimensions(space, name)]
            value = numbers[0]
            if isinstance(domain, Grad) and domain.value_shape and space.owner(name) == "sampler":
                flat = torch.tensor(numbers, dtype=torch.float64)
                value = flat.reshape(coordinate_shape(domain))
                value = (_to_simplex(value) if domain.scale == "simplex" else value).tolist()
        result[name] = checked(space, name, value)
    return {name: result[name] for name in space if name in result}


def gather(space: Declaration, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values behind mangled names; labels that are inactive are ignored.

    Raises:
        ValueError: an unknown label, a missing one, or a value outside its domain.
    """
    known = {d.label: d for name in space.sampled for d in dimensions(space, name)}
    for label in params:
        if label not in known:
            raise ValueError(f"params: unknown name {label!r}; {did_you_mean(label, known)}")

    def value_of(dimension: Dimension) -> Any:
        if dimension.label not in params:
            raise ValueError(
                f"params: {dimension.label!r} is missing; got {', '.join(params) or 'none'}."
            )
        return dimension.domain.check(dimension.label, _snapped(dimension, params))

    return assemble(space, value_of)


def _snapped(dimension: Dimension, params: Mapping[str, Any]) -> Any:
    """A number that a sampler's rounding put beyond a bound, back on it."""
    value, domain = params[dimension.label], dimension.domain
    if isinstance(domain, Float) and isinstance(value, float):
        for bound in (domain.low, domain.high):
            if math.isclose(value, bound, rel_tol=1e-12):
                return bound
    return value


def scatter(space: Declaration, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampled ones among checked values by mangled names; undoes `gather`."""
    params: dict[str, Any] = {}
    for name in space.sampled:
        if name not in values:
            continue
        domain, value = space[name], values[name]
        labels = [dimension.label for dimension in dimensions(space, name)]
        if not isinstance(domain, Grad):
            numbers = [value]
        else:
            tensor = torch.as_tensor(value, dtype=torch.float64)
            if domain.scale == "simplex":
                tensor = _from_simplex(tensor)
            low, high = (0.0, 1.0) if domain.scale == "simplex" else (domain.low, domain.high)
            # A float32 tensor holds the bounds rounded.
            numbers = tensor.detach().clamp(low, high).flatten().tolist()[: len(labels)]
        params.update(zip(labels, numbers, strict=True))
    return params


def draw(dimension: Dimension, generator: torch.Generator) -> Any:
    """Draw from a dimension: uniformly, on a log scale uniformly in the logarithm.

    An integer on a log scale is the nearest to a log-uniform number in [low - ½, high + ½].
    """
    domain = dimension.domain
    u = float(torch.rand((), generator=generator, dtype=torch.float64, device=generator.device))
    if isinstance(domain, Float):
        if domain.log:
            value = math.exp(math.log(domain.low) + u * math.log(domain.high / domain.low))
        else:
            value = (1 - u) * domain.low + u * domain.high
        return min(max(value, domain.low), domain.high)
    if isinstance(domain, Int):
        if domain.log:
            low, high = domain.low - 0.5, domain.high + 0.5
            number = round(math.exp(math.log(low) + u * math.log(high / low)))
            return min(max(number, domain.low), domain.high)
        return domain.low + int(u * ((domain.high - domain.low) // domain.step + 1)) * domain.step
    known = options(domain)
    return known[int(u * len(known))]


def _to_simplex(u: Tensor) -> Tensor:
    left = torch.arange(u.shape[-1], 0, -1, dtype=u.dtype)  # n - 1 - i
    rest = (1 - u) ** (1 / left)
    ones = torch.ones_like(u[..., :1])
    before = torch.cat([ones, rest.cumprod(-1)], -1)
    return before * torch.cat([1 - rest, ones], -1)


def _from_simplex(p: Tensor) -> Tensor:
    left = torch.arange(p.shape[-1] - 1, 0, -1, dtype=p.dtype)
    # rᵢ summed from the end: exact where 1 minus the elements before would cancel.
    tails = p.flip(-1).cumsum(-1).flip(-1)
    share = torch.where(tails[..., :-1] > 0, p[..., :-1] / tails[..., :-1], 0.0)
    return 1 - (1 - share) ** left
