"""Conditions: a domain that exists only where other hyperparameters have given values."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

__all__ = ["Condition", "Option", "as_option", "same", "text"]

Option = None | bool | int | float | str
"""A value that JSON, Optuna and Ray Tune all store as it is."""


def as_option(what: str, value: Any) -> Option:
    """Return the plain Python scalar for a value; NumPy scalars are converted.

    Raises:
        TypeError: neither None, bool, number nor string.
        ValueError: NaN or infinite.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise ValueError(f"{what} must be finite, but got {value!r}.")
        return float(value)
    raise TypeError(
        f"{what} must be None, a bool, a number or a string, "
        f"but got {value!r} ({type(value).__name__})."
    )


def same(a: object, b: object) -> bool:
    """Equality that tells True from 1 and 1 from 1.0, as JSON does."""
    return type(a) is type(b) and a == b


def text(value: Option) -> str:
    """Return a value as text inside a mangled name, percent-encoded where ambiguous."""
    return quote(value if isinstance(value, str) else repr(value), safe=" .:;+-_~()*!?'\"<>#$")


class Condition(Mapping[str, tuple[Option, ...]]):
    """Names and the values they must have; several names must hold together.

    Args:
        when: name -> one value, or a tuple or list of values of which any will do.

    Raises:
        TypeError: a value that is not a plain scalar.
        ValueError: no value given for a name.
    """

    def __init__(self, when: Mapping[str, Any] | None = None) -> None:
        if when is not None and not isinstance(when, Mapping):
            raise TypeError(f"when must map names to values, but got {when!r}.")
        items: dict[str, tuple[Option, ...]] = {}
        for name, values in (when or {}).items():
            options = tuple(values) if isinstance(values, tuple | list) else (values,)
            if not options:
                raise ValueError(f"when[{name!r}] needs at least one value, but got {values!r}.")
            items[name] = tuple(as_option(f"when[{name!r}]", option) for option in options)
        self._items = items

    def __getitem__(self, name: str) -> tuple[Option, ...]:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        plain = {name: v[0] if len(v) == 1 else v for name, v in self._items.items()}
        return repr(plain)

    def __str__(self) -> str:
        """For people: ``arch='mlp' or 'cnn', norm=True``."""
        return ", ".join(f"{n}={' or '.join(map(repr, v))}" for n, v in self._items.items())

    @property
    def suffix(self) -> str:
        """For mangled names: ``@arch=mlp|cnn&norm=True``, empty without a condition."""
        if not self._items:
            return ""
        return "@" + "&".join(f"{n}={'|'.join(map(text, v))}" for n, v in self._items.items())

    @staticmethod
    def split(label: str) -> tuple[str, dict[str, tuple[str, ...]]]:
        """Undo `suffix`: a mangled name as the plain name and the texts of its condition."""
        name, _, rest = label.partition("@")
        parts = (part.partition("=") for part in rest.split("&") if rest)
        return name, {n: tuple(unquote(v) for v in values.split("|")) for n, _, values in parts}

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether every name is active (present in `values`) and has one of its values."""
        return all(
            name in values and any(same(values[name], option) for option in options)
            for name, options in self._items.items()
        )
