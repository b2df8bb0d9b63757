"""A space from the sampler's view of it: undoes the mangled names of `bilevel.dimensions`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from bilevel.checks import did_you_mean
from bilevel.conditions import Condition, Option, text
from bilevel.dimensions import options
from bilevel.domains import Choice, Domain, Fixed, Float, Grad, Int, Switch
from bilevel.space import Space

__all__ = ["from_options", "rebuild"]

_LABEL = re.compile(r"(?P<name>[^\[@]+)(\[(?P<index>\d+(,\d+)*)\])?(@.*)?", re.DOTALL)


def rebuild(labels: Mapping[str, Domain]) -> Space:
    """Return the space whose sampled names have these labels and domains.

    ``wd[0]``, ``wd[1]``, ... become one tensor-valued `Grad` owned by the sampler, and
    ``width@arch=mlp`` a domain under a condition.  Defaults are in the middle of the ranges,
    because samplers know none; a simplex comes back as its free coordinates.

    Raises:
        ValueError: a label that is no identifier, index and condition; elements missing or
            with different ranges; a condition on a name or value that is not there.
    """
    whole: dict[str, Domain] = {}
    elements: dict[str, dict[tuple[int, ...], Domain]] = {}
    conditions: dict[str, dict[str, tuple[str, ...]]] = {}
    for label, domain in labels.items():
        match = _LABEL.fullmatch(label)
        if match is None or not match["name"].isidentifier():
            raise ValueError(
                f"{label!r} must be an identifier, optionally with an index and a condition, "
                "such as 'wd', 'wd[0]' or 'width@arch=mlp'."
            )
        name = match["name"]
        condition = Condition.split(label)[1]
        index = tuple(map(int, match["index"].split(","))) if match["index"] else None
        again = name in whole or (name in elements and index is None)
        if again or conditions.setdefault(name, condition) != condition:
            raise ValueError(f"{label!r}: the name {name!r} is there twice.")
        if index is None:
            whole[name] = domain
        else:
            elements.setdefault(name, {})[index] = domain
    names = list(conditions)
    for name, parts in elements.items():
        whole[name] = _tensor(name, parts)
    domains = {}
    for name in names:
        when = {p: _options(name, p, texts, whole) for p, texts in conditions[name].items()}
        domains[name] = whole[name].under(when)
    return Space(domains).own(**dict.fromkeys(elements, "sampler"))


def from_options(values: tuple[Option, ...]) -> Choice | Switch:
    """Return a `Switch` for (False, True), otherwise a `Choice`."""
    switch = len(values) == 2 and values[0] is False and values[1] is True
    return Switch() if switch else Choice(*values)


def _tensor(name: str, parts: Mapping[tuple[int, ...], Domain]) -> Grad:
    """One domain for all elements of a tensor."""
    first = next(iter(parts.values()))
    if not isinstance(first, Float) or any(part != first for part in parts.values()):
        raise ValueError(
            f"{name}: all elements must be floating with the same range, "
            f"but got {', '.join(map(repr, dict.fromkeys(parts.values())))}."
        )
    dims = {len(index) for index in parts}
    shape = tuple(max(axis) + 1 for axis in zip(*parts, strict=False))
    if len(dims) > 1 or len(parts) != math.prod(shape):
        raise ValueError(
            f"{name}: expected every element of shape {shape}, but got {len(parts)} of "
            f"{math.prod(shape)}."
        )
    scale: Any = "log" if first.log else "linear"
    return Grad(first.default_value, first.low, first.high, scale, shape=shape)


def _options(
    name: str, parent: str, texts: tuple[str, ...], domains: Mapping[str, Domain]
) -> tuple[Option, ...]:
    """The values of a parent behind their texts."""
    if parent not in domains:
        raise ValueError(
            f"{name} is conditional on {parent!r}, which is not there; "
            f"{did_you_mean(parent, domains)}"
        )
    domain = domains[parent]
    known: tuple[Option, ...] = ()
    if isinstance(domain, Choice | Switch):
        known = options(domain)
    elif isinstance(domain, Fixed):
        known = (domain.value,)
    elif isinstance(domain, Int):
        known = tuple(int(t) for t in texts if re.fullmatch(r"-?\d+", t))
    by_text = {unquote(text(option)): option for option in known}
    chosen = tuple(by_text[t] for t in texts if t in by_text)
    if len(chosen) != len(texts):
        raise ValueError(
            f"{name} is conditional on {parent}={' or '.join(texts)}, but {parent} is {domain!r}."
        )
    return chosen
