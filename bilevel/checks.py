"""Checks of single arguments; every message names the argument, the value and what was expected."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

__all__ = ["did_you_mean", "integer", "real"]


def real(what: str, value: Any) -> float:
    """Return a finite real number as a float.

    Raises:
        TypeError: not a real number; a bool is none.
        ValueError: NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} must be a number, but got {value!r} ({type(value).__name__}).")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} must be finite, but got {number}.")
    return number


def integer(what: str, value: Any, minimum: int | None = None) -> int:
    """Return an integer, optionally of at least `minimum`.

    Raises:
        TypeError: not an integer; a bool is none.
        ValueError: below the minimum.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{what} must be an integer, but got {value!r} ({type(value).__name__}).")
    number = int(value)
    if minimum is not None and number < minimum:
        raise ValueError(f"{what} must be at least {minimum}, but got {number}.")
    return number


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: a close match and all known names."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}."
