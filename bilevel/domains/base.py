"""What all domains share."""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import numpy as np
from torch import Tensor

from bilevel.conditions import Condition, same

__all__ = ["Domain"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Domain(ABC):
    """What all domains share.

    Attributes:
        when: other name -> the value, or tuple of values, at which this one is active.
        doc: one line for tables and command-line help.
    """

    default_owner: ClassVar[str]

    when: Mapping[str, Any] = dataclasses.field(default_factory=Condition)
    doc: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "when", Condition(self.when))
        if not isinstance(self.doc, str):
            raise TypeError(f"{self.kind}: doc must be a string, but got {self.doc!r}.")

    @property
    def kind(self) -> str:
        """The name of the class."""
        return type(self).__name__

    @property
    def condition(self) -> Condition:
        """`when`, as the type it is stored in."""
        return cast(Condition, self.when)

    @property
    @abstractmethod
    def default_value(self) -> Any:
        """The value where none is given."""

    @abstractmethod
    def check(self, name: str, value: Any) -> Any:
        """Return the value as the plain type of the domain.

        Raises:
            TypeError: a value of another type.
            ValueError: a value outside the domain.
        """

    @abstractmethod
    def refusal(self, owner: str) -> str | None:
        """Why this domain cannot have an owner; None where it can."""

    def under(self, when: Mapping[str, Any]) -> Self:
        """Return the same domain under another condition."""
        other = copy.copy(self)
        other._set(when=Condition(when))
        return other

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            given = field.default is dataclasses.MISSING or not same(value, field.default)
            if given and not (field.name == "when" and not value):
                shown.append(f"{field.name}={value!r}")
        return f"{self.kind}({', '.join(shown)})"


def as_scalar(value: Any) -> Any:
    """A tensor or NumPy scalar as a Python scalar; everything else as it is."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.detach().item()
    return value.item() if isinstance(value, np.generic) else value


def check_range(kind: str, low: float, high: float, log: bool) -> None:
    """Refuse reversed or equal bounds, and a logarithm of a non-positive one."""
    if low >= high:
        hint = "; use Fixed for a constant" if low == high else ""
        raise ValueError(f"{kind}: low must be less than high, but got {low=} and {high=}{hint}.")
    if not math.isfinite(high - low):
        raise ValueError(f"{kind}: high - low must be finite, but got {low=} and {high=}.")
    if not isinstance(log, bool):
        raise TypeError(f"{kind}: log must be True or False, but got {log!r}.")
    if log and low <= 0:
        raise ValueError(f"{kind}: low must be positive on a log scale, but got {low=}.")


def discrete_refusal(domain: Domain, owner: str) -> str | None:
    """`Domain.refusal` of domains that only a sampler can own."""
    if owner == "grad":
        return f"{domain.kind} has no derivative; only Grad and Float can follow a hypergradient"
    if owner == "shared":
        return "it is one value; 'shared' is for tensor-valued Grad domains, use 'sampler'"
    return None
