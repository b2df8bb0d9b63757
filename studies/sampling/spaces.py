"""A space whose gradient-owned names are sampled, for trials without hypergradients."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from bilevel.algorithm import OuterAlgorithm
from bilevel.dimensions import Scalar, dimensions, options
from bilevel.domains import Choice, Grad, Int, Switch
from bilevel.space import Space

__all__ = [
    "check_discrete",
    "check_owners",
    "combinations",
    "distance",
    "points",
    "samplable",
    "sampled_space",
]

ONE_BY_ONE = 32
"""Elements up to which a tensor is sampled element by element; a larger one shares one value."""


def sampled_space(space: Space) -> Space:
    """Return the space with all that the gradient owns given to the sampler.

    Raises:
        ValueError: a domain that cannot be sampled, such as one without bounds.
    """
    owners = {}
    for name in space.grad:
        domain = space[name]
        shape = domain.value_shape if isinstance(domain, Grad) else ()
        simplex = isinstance(domain, Grad) and domain.scale == "simplex"
        small = simplex or (shape is not None and math.prod(shape) <= ONE_BY_ONE)
        owners[name] = "sampler" if small else "shared"
    return space.own(**owners)


def samplable(space: Space) -> bool:
    """Whether all that the gradient owns could be sampled instead."""
    return all(
        space[name].refusal("sampler") is None or space[name].refusal("shared") is None
        for name in space.grad
    )


def check_owners(space: Space, algorithm: OuterAlgorithm[Any] | None) -> None:
    """Refuse a space whose gradient-owned names nobody would move, and an algorithm without any.

    Raises:
        ValueError: names what the gradient owns.
    """
    if space.grad and algorithm is None:
        raise ValueError(
            f"algorithm: the gradient owns {list(space.grad)}, so an outer algorithm is needed, "
            "such as Descent(Unrolled(steps=5)); or give them to the sampler with space.own(...)."
        )
    if algorithm is not None and not space.grad:
        raise ValueError(
            f"algorithm: the gradient owns none of {list(space)}, but got {algorithm!r}."
        )


def check_discrete(space: Space) -> None:
    """Refuse a space that brute force cannot go through.

    Raises:
        ValueError: names what is continuous.
    """
    discrete = Choice | Switch | Int
    smooth = [
        name
        for name in space.sampled
        if not all(isinstance(part.domain, discrete) for part in dimensions(space, name))
    ]
    if smooth:
        raise ValueError(
            f"sampler: brute force goes through all values, but {smooth} are continuous; give them "
            "to the gradient, or fix them with space.fix(...)."
        )


def combinations(space: Space) -> int | None:
    """Return how many points the sampler has to choose from; None where they are not countable."""
    if any(space[name].when for name in space.sampled):
        return None  # what a condition switches off is no factor; Optuna enumerates it, too
    count = 1
    for name in space.sampled:
        for dimension in dimensions(space, name):
            domain = dimension.domain
            if isinstance(domain, Choice | Switch):
                count *= len(options(domain))
            elif isinstance(domain, Int):
                count *= (domain.high - domain.low) // domain.step + 1
            else:
                return None
    return count


def points(space: Space, seed: int) -> list[dict[str, Any]]:
    """Return all combinations by mangled names, in an order that the seed decides."""
    every = [dimension for name in space.sampled for dimension in dimensions(space, name)]
    grid = [dict(zip((d.label for d in every), point, strict=True)) for point in
            itertools.product(*(_values(d.domain) for d in every))]  # fmt: skip
    random.Random(seed).shuffle(grid)
    return grid


def _values(domain: Scalar) -> Sequence[Any]:
    if isinstance(domain, Int):
        return range(domain.low, domain.high + 1, domain.step)
    if isinstance(domain, Choice | Switch):
        return options(domain)
    raise TypeError(f"a domain with countable values was expected, but got {domain!r}.")


def distance(space: Space, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the mean distance of two trials over the sampler's dimensions, each in [0, 1].

    A number counts by its share of the range (of the logarithm where that is its scale), an option
    by whether it differs, and so does a dimension that only one of them has.
    """
    parts = []
    for name in space.sampled:
        for dimension in dimensions(space, name):
            label, domain = dimension.label, dimension.domain
            if label not in one and label not in other:
                continue
            if label not in one or label not in other or isinstance(domain, Choice | Switch):
                parts.append(float(one.get(label) != other.get(label)))
                continue
            scale = math.log if domain.log else float
            width = scale(domain.high) - scale(domain.low)
            parts.append(abs(scale(one[label]) - scale(other[label])) / width)
    return sum(parts) / len(parts) if parts else 0.0
