"""`Space`: hyperparameters declared once, each owned by the hypergradient, a sampler, or nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel import coordinates as _coordinates
from bilevel.checks import did_you_mean
from bilevel.declaration import Declaration
from bilevel.domains import Grad
from bilevel.owners import as_grad
from bilevel.values import checked, default

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
        for name in self._order:
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
                value = default(self[name], self._owners[name], self._constants.get(name))
            result[name] = checked(
                name,
                value,
                self[name],
                self._owners[name],
                self._constants.get(name),
                dtype,
                device,
            )
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
                value = checked(name, values[name], self[name], "grad", None, dtype, device)
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
