"""Bounds in floating-point arithmetic: the numbers of a dtype that lie between two bounds."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

__all__ = ["closed", "interior"]

Bounds = tuple[float | None, float | None]

_NUMPY: dict[torch.dtype, type[np.float32] | type[np.float64]] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
}


@lru_cache(maxsize=1024)
def closed(low: float | None, high: float | None, dtype: torch.dtype) -> Bounds:
    """Return the bounds rounded to a dtype, so that a value rounded alike stays inside."""
    kind = _NUMPY[dtype]
    return None if low is None else float(kind(low)), None if high is None else float(kind(high))


@lru_cache(maxsize=1024)
def interior(low: float | None, high: float | None, dtype: torch.dtype) -> Bounds:
    """Return the smallest and the largest number of a dtype strictly between the rounded bounds.

    At a bound of zero it is the smallest normal number, whose logarithm is safe everywhere.

    Raises:
        ValueError: no number of the dtype lies between.
    """
    kind = _NUMPY[dtype]
    tiny = torch.finfo(dtype).tiny
    first = last = None
    if low is not None:
        first = max(float(np.nextafter(kind(low), kind(np.inf))), float(kind(low) + kind(tiny)))
    if high is not None:
        last = min(float(np.nextafter(kind(high), kind(-np.inf))), float(kind(high) - kind(tiny)))
    if first is not None and last is not None and first > last:
        raise ValueError(f"no {dtype} number lies strictly between {low=} and {high=}.")
    return first, last
