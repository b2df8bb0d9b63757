"""Step sizes, constant or polynomially decreasing, and the checks of a config that has some."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from bilevel.checks import integer, real

__all__ = ["Decay", "Rate", "check_config", "rate"]


@dataclass(frozen=True)
class Decay:
    """A step size that decreases with the outer step k = 0, 1, ...: initial / (k + 1)^power.

    Attributes:
        initial: value at k = 0.
        power: exponent; 0 is a constant.

    Raises:
        TypeError: an argument that is no number.
        ValueError: a negative or non-finite one.
    """

    initial: float
    power: float

    def __post_init__(self) -> None:
        for name in ("initial", "power"):
            if real(f"Decay: {name}", getattr(self, name)) < 0:
                raise ValueError(f"Decay: {name} must be >= 0, but got {getattr(self, name)!r}.")

    def __call__(self, k: int) -> float:
        """Return the step size of outer step `k`."""
        return float(self.initial * (k + 1) ** -self.power)


Rate = float | Decay
"""A constant, or a `Decay`."""


def rate(value: Rate, k: int) -> float:
    """Return the value at outer step `k`."""
    return value(k) if isinstance(value, Decay) else value


def check_config(config: Any) -> None:
    """Check the integers and rates of a config dataclass.

    Integers count something, so they are at least 1; a `seed` may be 0, and `momentum` is a
    weight between 0 and 1.

    Raises:
        TypeError: a field of another type.
        ValueError: a field out of its range.
    """
    for f in fields(config):
        value, what = getattr(config, f.name), f"{type(config).__name__}: {f.name}"
        if f.type == "int":
            integer(what, value, 0 if f.name == "seed" else 1)
        elif f.type == "Rate":
            start = value.initial if isinstance(value, Decay) else real(what, value)
            if start < 0:
                raise ValueError(f"{what} must be >= 0, but got {value!r}.")
            if f.name == "momentum" and start > 1:
                raise ValueError(f"{what} must be at most 1, but got {value!r}.")
