"""`Space`: hyperparameters declared once, each owned by the hypergradient, a sampler, or nobody."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from bilevel import coordinates as _coordinates
from bilevel import dimensions as _dimensions
from bilevel import space_json
from bilevel.checks import did_you_mean
from bilevel.declaration import Declaration
from bilevel.domains import Grad
from bilevel.owners import as_grad
from bilevel.space_table import table
from bilevel.values import checked, default

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial

__all__ = ["Space"]


class Space(Declaration):
    """An immutable mapping from names to domains, with an owner for each name.

    A domain brings its owner: `Grad` the hypergradient ("grad"), `Float`, `Int`, `Choice` and
    `Switch` the sampler ("sampler"), `Fixed` nobody ("fixed"); `own` changes it.  Two spaces
    are equal when domains, owners and fixed values are; order and `doc` do not count.

    Args:
        domains: name -> domain.
        named: the same as keywords.

    Raises:
        TypeError: something else than a domain; a condition on a domain that cannot decide one.
        ValueError: a name that is no identifier or given twice; a condition on an unknown name
            or an impossible value; conditions in a cycle.
    """

    # Values.

    def defaults(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> dict[str, Any]:
        """Return the default of every name that is active at the defaults; see `validate`."""
        return self.validate({}, dtype=dtype, device=device)

    def validate(
        self,
        values: Mapping[str, Any],
        complete: bool = False,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Any]:
        """Check values and return those of all active names.

        Gradient-owned and tensor-valued values are returned as tensors, all others as plain
        Python values.

        Args:
            values: name -> value; a number stands for all elements of a tensor.
            complete: whether every active name must be there; otherwise defaults fill up.
            dtype: of the returned tensors; by default a given tensor keeps its own, and other
                values take torch's default.
            device: of the returned tensors; by default a given tensor stays where it is.

        Raises:
            TypeError: a value of another type.
            ValueError: unknown or inactive name; a value outside its domain or, where the
                gradient owns it, on a bound; another value for a fixed name; a missing one.
        """
        self._known(values, "validate")
        result: dict[str, Any] = {}
        for name in self.order:
            condition = self[name].condition
            if not condition.holds(result):
                if name in values:
                    found = ", ".join(
                        f"{n}={result[n]!r}" if n in result else f"{n} is inactive"
                        for n in condition
                    )
                    raise ValueError(f"{name} is active only when {condition}, but {found}.")
                continue
            if name in values:
                value = values[name]
            elif complete:
                raise ValueError(
                    f"{name} is missing; got values for {', '.join(values) or 'none'}."
                )
            else:
                value = default(self, name)
            result[name] = checked(self, name, value, dtype, device)
        return {name: result[name] for name in self if name in result}

    def coordinates(
        self,
        values: Mapping[str, Any],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Return the unconstrained coordinate z of each gradient-owned value; differentiable.

        Args:
            values: at least the gradient-owned values; conditional ones may be missing.
            dtype: float32 or float64; by default as in `validate`.
            device: by default as in `validate`.

        Raises:
            TypeError: a value of another type.
            ValueError: a missing or bad value, or one on a bound, where z would be infinite.
        """
        result = {}
        for name in self.grad:
            if name in values:
                value = checked(self, name, values[name], dtype, device)
                result[name] = _coordinates.coordinate(as_grad(self[name]), value)
            elif not self[name].when:
                raise ValueError(
                    f"{name} is missing; got values for {', '.join(values) or 'none'}."
                )
        return result

    def constrain(self, z: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values at unconstrained coordinates z; differentiable.

        However large z is, the values are strictly inside their bounds.

        Raises:
            TypeError: a coordinate that is not a float32 or float64 tensor.
            ValueError: a name that the gradient does not own, or a coordinate of another shape.
        """
        result = {}
        for name, point in z.items():
            if name not in self.grad:
                raise ValueError(
                    f"constrain: {name!r} is not owned by the gradient; "
                    f"{did_you_mean(name, self.grad)}"
                )
            domain = as_grad(self[name])
            if not isinstance(point, Tensor) or point.dtype not in (torch.float32, torch.float64):
                kind = point.dtype if isinstance(point, Tensor) else type(point).__name__
                raise TypeError(f"z[{name!r}] must be a float32 or float64 tensor, but got {kind}.")
            shape = _coordinates.coordinate_shape(domain)
            if point.shape != shape:
                raise ValueError(
                    f"z[{name!r}] must have shape {shape}, but got {tuple(point.shape)}."
                )
            result[name] = _coordinates.constrain(domain, point)
        return result

    def at(self, values: Mapping[str, Any], progress: float | Tensor) -> dict[str, Any]:
        """Return the values with every schedule read at a training progress in [0, 1].

        Linear between knots, on a log scale linear in the logarithm; differentiable.

        Raises:
            ValueError: progress outside [0, 1].
        """
        result = dict(values)
        for name, domain in self.items():
            if name in values and isinstance(domain, Grad) and domain.schedule is not None:
                result[name] = _coordinates.interpolate(domain, values[name], progress)
        return result

    # Sampling.

    def sample(self, generator: torch.Generator) -> dict[str, Any]:
        """Draw the sampled names uniformly (on a log scale in the logarithm).

        Returns values of all active names; those that no sampler owns are at their default.
        """
        return _dimensions.assemble(self, lambda dimension: _dimensions.draw(dimension, generator))

    def to_params(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sampled values by the mangled names that Optuna and Ray Tune see.

        For instance ``study.enqueue_trial(space.to_params({"lr": 0.1}))``.  Names are mangled
        as ``width@arch=mlp``, ``wd[0]``; see `bilevel.dimensions`.

        Args:
            values: checked by `validate`; defaults fill up.
        """
        return _dimensions.scatter(self, self.validate(values, dtype=torch.float64))

    def values_from_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of all active names behind an Optuna trial's params or a Ray config.

        Entries of inactive names are ignored; names that no sampler owns are at their default.

        Raises:
            TypeError: a value of another type.
            ValueError: an unknown name, a missing active one, or a value outside its domain.
        """
        return _dimensions.gather(self, params)

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """Ask an Optuna trial for the sampled names that are active (define-by-run).

        Returns values of all active names; those that no sampler owns are at their default.
        """
        from bilevel.to_optuna import suggest

        return suggest(self, trial)

    def to_optuna(self) -> dict[str, BaseDistribution]:
        """Return Optuna distributions by mangled name; see `bilevel.to_optuna.to_optuna`."""
        from bilevel.to_optuna import to_optuna

        return to_optuna(self)

    @staticmethod
    def from_optuna(distributions: Mapping[str, BaseDistribution]) -> Space:
        """Return the space of Optuna distributions; see `bilevel.to_optuna.from_optuna`."""
        from bilevel.to_optuna import from_optuna

        return from_optuna(distributions)

    def to_ray(self) -> dict[str, Any]:
        """Return a Ray Tune `param_space` by mangled name; see `bilevel.to_ray.to_ray`."""
        from bilevel.to_ray import to_ray

        return to_ray(self)

    @staticmethod
    def from_ray(param_space: Mapping[str, Any]) -> Space:
        """Return the space of a Ray Tune `param_space`; see `bilevel.to_ray.from_ray`."""
        from bilevel.to_ray import from_ray

        return from_ray(param_space)

    # Storing.

    def to_json(self) -> str:
        """Return the space with its owners as JSON text."""
        return space_json.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the space that `to_json` wrote.

        Raises:
            ValueError: the text is no JSON, or no space.
        """
        return space_json.loads(cls, text)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of domains, owners and fixed values, not of order and `doc`."""
        return space_json.fingerprint(self)

    def differences(self, other: Space) -> list[str]:
        """List what changed from this space to another, such as ``lr: high 1.0 -> 0.5``."""
        return space_json.differences(self, other)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return table(self)
