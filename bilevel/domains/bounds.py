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
    """Return the bounds rounded to a dtype, so that a value rounded alike stays inside.

    Raises:
        ValueError: a bound beyond the largest number of the dtype.
    """
    return _rounded(low, dtype), _rounded(high, dtype)


@lru_cache(maxsize=1024)
def interior(low: float | None, high: float | None, dtype: torch.dtype) -> Bounds:
    """Return the smallest and the largest number of a dtype strictly between the rounded bounds.

    At a bound of zero it is the smallest normal number, whose logarithm is safe everywhere.

    Raises:
        ValueError: no number of the dtype lies between.
    """
    bottom, top = closed(low, high, dtype)
    kind = _NUMPY[dtype]
    tiny = kind(torch.finfo(dtype).tiny)
    first = last = None
    if bottom is not None:
        b = kind(bottom)
        first = max(float(np.nextafter(b, kind(np.inf))), float(b + tiny))
    if top is not None:
        t = kind(top)
        last = min(float(np.nextafter(t, kind(-np.inf))), float(t - tiny))
    if first is not None and last is not None and first > last:
        raise ValueError(f"no {dtype} number lies strictly between {low=} and {high=}.")
    return first, last


def _rounded(bound: float | None, dtype: torch.dtype) -> float | None:
    if bound is None:
        return None
    if abs(bound) > torch.finfo(dtype).max:
        raise ValueError(f"the bound {bound} does not fit in {dtype}.")
    return float(_NUMPY[dtype](bound))
