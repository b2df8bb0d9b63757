"""`Grad`: a smooth hyperparameter that follows its hypergradient during training."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bilevel.checks import did_you_mean, integer, real
from bilevel.domains.base import Domain, check_range
from bilevel.domains.bounds import closed, interior

__all__ = ["MAX_SAMPLED", "Grad", "Scale"]

Scale = Literal["linear", "log", "simplex"]

MAX_SAMPLED = 64
"""Most elements of a tensor that a sampler may own one by one."""


@dataclass(frozen=True, repr=False)
class Grad(Domain):
    """A real number or tensor, owned by the hypergradient unless a space says otherwise.

    Values lie strictly between `low` and `high`; the outer optimizer moves an unconstrained
    coordinate of them, see `bilevel.coordinates`.

    Attributes:
        init: the value before the first outer step: a number for all elements, or a tensor,
            array or nested sequence of `shape` or, with a schedule, of (schedule, *shape).
            Stored as a float or nested tuples.
        low: lower bound, never reached; None for none.
        high: upper bound, never reached; None for none.
        scale: "linear"; "log" for positive values on a logarithmic scale; "simplex" for
            positive values that sum to 1 over the last dimension.
        shape: of the value; () for a number.
        schedule: number k ≥ 2 of knots: one value per knot, equally spaced over training
            progress, interpolated between.  The value then has shape (k, *shape).

    Raises:
        TypeError: an argument of another type, such as a bool for a number.
        ValueError: bounds reversed, equal or not finite; a log scale with a non-positive bound;
            init on a bound, outside, not finite, or of another shape; a simplex without a
            last dimension of at least 2, or with bounds; fewer than 2 knots; unknown scale.
    """

    default_owner: ClassVar[str] = "grad"

    init: float | Sequence[Any] | Tensor
    low: float | None = None
    high: float | None = None
    scale: Scale = "linear"
    shape: tuple[int, ...] = ()
    schedule: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in get_args(Scale):
            known = did_you_mean(self.scale, get_args(Scale))
            raise ValueError(f"Grad: unknown scale {self.scale!r}; {known}")
        if isinstance(self.shape, str) or not isinstance(self.shape, Sequence):
            raise TypeError(f"Grad: shape must be a tuple of integers, but got {self.shape!r}.")
        self._set(shape=tuple(integer("Grad: shape", size, minimum=1) for size in self.shape))
        if self.schedule is not None:
            self._set(schedule=integer("Grad: schedule", self.schedule, minimum=2))
        self._check_bounds()
        self._set(init=self._stored(self.init))

    def _check_bounds(self) -> None:
        if self.scale == "simplex":
            if self.low is not None or self.high is not None:
                raise ValueError(
                    "Grad: a simplex has no low and high, its elements are between 0 and 1, "
                    f"but got low={self.low!r} and high={self.high!r}."
                )
            if not self.shape or self.shape[-1] < 2:
                raise ValueError(
                    "Grad: shape must end in a dimension of at least 2 for scale='simplex', "
                    f"but got shape={self.shape}."
                )
            return
        if self.low is not None:
            self._set(low=real("Grad: low", self.low))
        if self.high is not None:
            self._set(high=real("Grad: high", self.high))
        for name in ("low", "high"):
            bound = getattr(self, name)
            if self.scale == "log" and bound is not None and bound <= 0:
                raise ValueError(
                    f"Grad: {name} must be positive on a log scale, but got {name}={bound}; "
                    "leave it out for no bound."
                )
        if self.low is not None and self.high is not None:
            check_range("Grad", self.low, self.high, False)

    def _stored(self, init: Any) -> Any:
        """Check init and return it as a float or as nested tuples."""
        if isinstance(init, numbers.Number | str) or init is None:
            number = real("Grad: init", init)
            self.check("Grad: init", number, inside=True)
            return number
        array = _array("Grad: init", init)
        if array.shape not in {self.shape, self.value_shape}:
            raise ValueError(
                f"Grad: init must be a number or have shape {self.value_shape}, "
                f"but got shape {array.shape}."
            )
        self.check("Grad: init", torch.from_numpy(array), inside=True)
        return _nested(array.tolist())

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of a value: `shape`, after the knots of a schedule."""
        return self.shape if self.schedule is None else (self.schedule, *self.shape)

    @property
    def numel(self) -> int:
        """Number of elements of a value."""
        return math.prod(self.value_shape)

    @property
    def default_value(self) -> Any:
        """`init` as it is stored: a float or nested tuples."""
        return self.init

    @property
    def _range(self) -> tuple[float | None, float | None]:
        if self.scale == "simplex":
            return 0.0, 1.0
        return 0.0 if self.scale == "log" and self.low is None else self.low, self.high

    def limits(self, dtype: torch.dtype) -> tuple[float | None, float | None]:
        """Return the smallest and the largest value that a dtype can hold strictly inside."""
        return interior(*self._range, dtype)

    def check(self, name: str, value: Any, *, inside: bool = False) -> Tensor:
        """Return a tensor of `value_shape`; a number stands for all elements.

        Args:
            name: for messages.
            value: a number, or a tensor, array or nested sequence of the right shape.  A float32 or
                float64 tensor is returned as it is; other values come as float64, half-precision
                tensors as float32.
            inside: whether a value on a bound is refused too, because its coordinate would be
                infinite.

        Raises:
            TypeError: not numeric.
            ValueError: another shape, or an element that is not finite or outside; names its index.
        """
        tensor = self._as_tensor(name, value)
        if tensor.shape != self.value_shape:
            if tensor.shape != self.shape:
                raise ValueError(
                    f"{name} must have shape {self.value_shape}, but got {tuple(tensor.shape)}."
                )
            tensor = tensor.expand(self.value_shape)
        _require(torch.isfinite(tensor), tensor, name, "finite")
        dtype = tensor.dtype
        first, last = self.limits(dtype) if inside else closed(*self._range, dtype)
        bounds = f"in {self.interval(inside)}"
        if first is not None:
            _require(tensor >= first, tensor, name, bounds)
        if last is not None:
            _require(tensor <= last, tensor, name, bounds)
        if self.scale == "simplex":
            total = tensor.sum(-1)
            _require((total - 1).abs() <= 1e-6, total, f"the sum of {name}", "1 (scale='simplex')")
        return tensor

    def _as_tensor(self, name: str, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                raise TypeError(f"{name} must be a floating tensor, but got dtype {value.dtype}.")
            return value if value.dtype in (torch.float32, torch.float64) else value.float()
        if isinstance(value, numbers.Number | str) or value is None:
            number = torch.tensor(real(name, value), dtype=torch.float64)
            return number.expand(self.value_shape)
        return torch.from_numpy(_array(name, value))

    def interval(self, inside: bool) -> str:
        """Return the range for people, such as ``(1e-06, 100.0)``."""
        low, high = self._range
        left = "(" if inside or low is None else "["
        right = ")" if inside or high is None else "]"
        return f"{left}{'-inf' if low is None else low}, {'inf' if high is None else high}{right}"

    def refusal(self, owner: str) -> str | None:
        """See `Domain.refusal`."""
        if owner in {"grad", "fixed"}:
            return None
        if owner == "shared" and (self.scale == "simplex" or not self.value_shape):
            what = "a simplex needs different ones" if self.value_shape else "it is a number"
            return f"'shared' gives all elements one value, and {what}; use 'sampler'"
        if self.scale != "simplex" and (self.low is None or self.high is None):
            return f"a sampler needs both bounds, but low={self.low} and high={self.high}"
        if owner == "sampler" and self.numel > MAX_SAMPLED:
            return (
                f"it has {self.numel} elements and a sampler takes at most {MAX_SAMPLED} one by "
                "one; use 'shared' for one value in all of them"
            )
        return None


def _array(name: str, value: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangular array, but got {value!r}.") from error
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold numbers, but got {value!r} (dtype {array.dtype}).")
    return array.astype(np.float64)


def _nested(values: Any) -> Any:
    return tuple(_nested(value) for value in values) if isinstance(values, list) else values


def _require(ok: Tensor, values: Tensor, name: str, expected: str) -> None:
    """Raise ValueError about the first element that is not ok."""
    if bool(ok.all()):
        return
    index = tuple(torch.nonzero(~ok)[0].tolist()) if ok.dim() else ()
    at = f"[{', '.join(map(str, index))}]" if index else ""
    raise ValueError(f"{name}{at} must be {expected}, but got {values[index].item()}.")
