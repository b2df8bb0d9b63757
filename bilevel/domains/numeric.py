"""Numbers that a sampler draws: `Float` and `Int`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from bilevel.checks import integer, real
from bilevel.domains.base import Domain, as_scalar, check_range, discrete_refusal

__all__ = ["Float", "Int"]


@dataclass(frozen=True, repr=False)
class Float(Domain):
    """A real number in [low, high], owned by the sampler unless a space says otherwise.

    Attributes:
        low: smallest value.
        high: largest value.
        log: sample, interpolate and descend on a logarithmic scale.
        default: (low + high)/2, on a log scale √(low·high), unless given.

    Raises:
        TypeError: an argument that is not a number.
        ValueError: bounds reversed, equal, not finite, or on a log scale not positive; a default
            outside.
    """

    default_owner: ClassVar[str] = "sampler"

    low: float
    high: float
    log: bool = False
    default: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = real("Float: low", self.low), real("Float: high", self.high)
        check_range("Float", low, high, self.log)
        middle = math.sqrt(low) * math.sqrt(high) if self.log else low / 2 + high / 2
        default = middle if self.default is None else real("Float: default", self.default)
        self._set(low=low, high=high, default=default)
        if not low <= default <= high:
            raise ValueError(f"Float: default must be in [{low}, {high}], but got {default=}.")

    @property
    def default_value(self) -> float:
        """`default`, never None."""
        return cast(float, self.default)

    def check(self, name: str, value: Any) -> float:
        """Return a float in [low, high]; see `Domain.check`."""
        number = real(name, as_scalar(value))
        if not self.low <= number <= self.high:
            raise ValueError(f"{name} must be in [{self.low}, {self.high}], but got {number}.")
        return number

    def refusal(self, owner: str) -> str | None:
        """See `Domain.refusal`."""
        if owner == "shared":
            return "it is one number; 'shared' is for tensor-valued Grad domains, use 'sampler'"
        if owner == "grad" and not self.low < self.default_value < self.high:
            return (
                f"its default {self.default} is on a bound, where the unconstrained coordinate is "
                "infinite; give a default strictly inside"
            )
        return None


@dataclass(frozen=True, repr=False)
class Int(Domain):
    """An integer in {low, low + step, ..., high}, owned by the sampler.

    Attributes:
        low: smallest value.
        high: largest value, itself included.
        log: sample on a logarithmic scale; needs low ≥ 1 and step 1.
        step: distance of neighbors; must divide high - low.
        default: the value nearest the middle (geometric on a log scale) unless given.

    Raises:
        TypeError: an argument that is not an integer.
        ValueError: bounds reversed or equal, a step that does not fit, a default outside.
    """

    default_owner: ClassVar[str] = "sampler"

    low: int
    high: int
    log: bool = False
    step: int = 1
    default: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = integer("Int: low", self.low), integer("Int: high", self.high)
        step = integer("Int: step", self.step, minimum=1)
        check_range("Int", low, high, self.log)
        if self.log and step != 1:
            raise ValueError(f"Int: step must be 1 on a log scale, but got {step=}.")
        if (high - low) % step:
            reach = high - (high - low) % step
            raise ValueError(
                f"Int: step must divide high - low = {high - low}, but got {step=}; "
                f"the last value in reach is {reach}."
            )
        if self.default is None:
            middle = round(math.exp((math.log(low) + math.log(high)) / 2)) if self.log else None
            default = low + (high - low) // step // 2 * step if middle is None else middle
        else:
            default = integer("Int: default", self.default)
        self._set(low=low, high=high, step=step, default=default)
        self.check("Int: default", default)

    @property
    def default_value(self) -> int:
        """`default`, never None."""
        return cast(int, self.default)

    def check(self, name: str, value: Any) -> int:
        """Return an int of the grid; see `Domain.check`."""
        number = integer(name, as_scalar(value))
        if not self.low <= number <= self.high or (number - self.low) % self.step:
            grid = f" in steps of {self.step}" if self.step > 1 else ""
            raise ValueError(f"{name} must be in {self.low}..{self.high}{grid}, but got {number}.")
        return number

    def refusal(self, owner: str) -> str | None:
        """See `Domain.refusal`."""
        return discrete_refusal(self, owner)
