"""Spaces to and from Ray Tune search spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bilevel.dimensions import Scalar, dimensions, options
from bilevel.domains import Domain, Fixed, Float, Int
from bilevel.rebuild import from_options, rebuild
from bilevel.space import Space

__all__ = ["from_ray", "to_ray"]


def to_ray(space: Space) -> dict[str, Any]:
    """Return a `param_space` for Ray Tune: one flat entry per dimension, by mangled name.

    Ray Tune searchers draw every entry in every trial; a trainable turns its config into values by
    `Space.values_from_params`, which ignores entries whose condition does not hold.  Bounds
    are inclusive here and exclusive at the top in `tune.randint`; that is accounted for.
    """
    return {
        dimension.label: _to_ray(dimension.domain)
        for name in space.sampled
        for dimension in dimensions(space, name)
    }


def from_ray(param_space: Mapping[str, Any]) -> Space:
    """Return the space of a flat Ray Tune search space; plain scalars become `Fixed`.

    See `bilevel.rebuild.rebuild` for the names.

    Raises:
        ValueError: an entry without a counterpart: a normal distribution, a quantized float or
            logarithmic integer, a function, a grid search, a nested dict; or bad names.
    """
    return rebuild({label: _from_ray(label, entry) for label, entry in param_space.items()})


def _to_ray(domain: Scalar) -> Any:
    from ray import tune

    if isinstance(domain, Float):
        uniform = tune.loguniform if domain.log else tune.uniform
        return uniform(domain.low, domain.high)
    if isinstance(domain, Int):
        if domain.log:
            return tune.lograndint(domain.low, domain.high + 1)
        if domain.step == 1:
            return tune.randint(domain.low, domain.high + 1)
        if domain.low % domain.step == 0:
            return tune.qrandint(domain.low, domain.high, domain.step)
        # Ray's grids are multiples of the step.
        return tune.choice(list(range(domain.low, domain.high + 1, domain.step)))
    return tune.choice(list(options(domain)))


def _from_ray(label: str, entry: Any) -> Domain:
    from ray.tune.search import sample

    sampler = None
    if isinstance(entry, sample.Domain):
        sampler = entry.get_sampler()  # type: ignore[no-untyped-call]
    if isinstance(entry, sample.Categorical) and isinstance(sampler, sample.Uniform):
        return from_options(tuple(entry.categories))
    if isinstance(entry, sample.Float):
        if isinstance(sampler, sample.LogUniform):
            return Float(entry.lower, entry.upper, log=True)
        if isinstance(sampler, sample.Uniform):
            return Float(entry.lower, entry.upper)
    if isinstance(entry, sample.Integer):
        if isinstance(sampler, sample.LogUniform):
            return Int(entry.lower, entry.upper - 1, log=True)
        if isinstance(sampler, sample.Uniform):
            return Int(entry.lower, entry.upper - 1)
        if isinstance(sampler, sample.Quantized) and isinstance(sampler.sampler, sample.Uniform):
            q = int(sampler.q)
            if q == 1:  # upper-exclusive, as randint
                return Int(entry.lower, entry.upper - 1)
            return Int(-(-entry.lower // q) * q, entry.upper // q * q, step=q)
    if entry is None or isinstance(entry, bool | int | float | str):
        return Fixed(entry)
    kind = f"{type(entry).__name__} with sampler {sampler}" if sampler else repr(entry)
    raise ValueError(
        f"{label!r} must be tune.uniform, loguniform, randint, lograndint, qrandint, choice or a "
        f"plain scalar, but got {kind}."
    )
