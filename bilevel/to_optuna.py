"""Spaces to and from Optuna: distributions for ask-and-tell, `suggest` for define-by-run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bilevel.dimensions import Dimension, Scalar, assemble, dimensions, options
from bilevel.domains import Domain, Float, Int
from bilevel.rebuild import from_options, rebuild
from bilevel.space import Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial

__all__ = ["from_optuna", "suggest", "to_optuna"]


def to_optuna(space: Space) -> dict[str, BaseDistribution]:
    """Return a distribution for each dimension a sampler may set, by mangled name.

    Dimensions under a condition are included; `Space.values_from_params` ignores those that
    are inactive.
    """
    return {
        dimension.label: _distribution(dimension.domain)
        for name in space.sampled
        for dimension in dimensions(space, name)
    }


def from_optuna(distributions: Mapping[str, BaseDistribution]) -> Space:
    """Return the space of some distributions; see `bilevel.rebuild.rebuild` for the names.

    Raises:
        TypeError: not an Optuna distribution.
        ValueError: a distribution without a counterpart (a float with a step, a single value), or
            bad names.
    """
    return rebuild({label: _domain(label, d) for label, d in distributions.items()})


def suggest(space: Space, trial: BaseTrial) -> dict[str, Any]:
    """Ask a trial for every active sampled name and return the values of all active names.

    Parents are asked first, so that only what is active is asked (define-by-run); names that
    the gradient owns are at their init.  Works with `Trial`, `FixedTrial` and `FrozenTrial`.
    """

    def value_of(dimension: Dimension) -> Any:
        label, domain = dimension.label, dimension.domain
        if isinstance(domain, Float):
            return trial.suggest_float(label, domain.low, domain.high, log=domain.log)
        if isinstance(domain, Int):
            return trial.suggest_int(
                label, domain.low, domain.high, step=domain.step, log=domain.log
            )
        return trial.suggest_categorical(label, options(domain))

    return assemble(space, value_of)


def _distribution(domain: Scalar) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(domain, Float):
        return FloatDistribution(domain.low, domain.high, log=domain.log)
    if isinstance(domain, Int):
        return IntDistribution(domain.low, domain.high, log=domain.log, step=domain.step)
    return CategoricalDistribution(options(domain))


def _domain(label: str, distribution: BaseDistribution) -> Domain:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(distribution, CategoricalDistribution):
        return from_options(tuple(distribution.choices))
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        raise TypeError(f"{label!r} must be an Optuna distribution, but got {distribution!r}.")
    if distribution.single():
        raise ValueError(f"{label!r} has one value only; use Fixed, but got {distribution!r}.")
    if isinstance(distribution, IntDistribution):
        return Int(distribution.low, distribution.high, distribution.log, distribution.step)
    if distribution.step is not None:
        raise ValueError(
            f"{label!r} has a step, which Float has not; use an Int and scale it, "
            f"but got {distribution!r}."
        )
    return Float(distribution.low, distribution.high, distribution.log)
