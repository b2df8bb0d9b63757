"""Hypothesis strategies: arbitrary valid domains and spaces."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from bilevel import Choice, Domain, Fixed, Float, Grad, Int, Space, Switch

_unit = st.floats(0.01, 0.99)


@st.composite
def bounds(draw: st.DrawFn, log: bool) -> tuple[float, float]:
    if log:
        low = 10 ** draw(st.floats(-8, 3))
        return low, low * 10 ** draw(st.floats(0.1, 6))
    low = draw(st.floats(-1e3, 1e3))
    return low, low + draw(st.floats(0.01, 1e3))


def between(low: float, high: float, log: bool, u: float) -> float:
    if log:
        return math.exp((1 - u) * math.log(low) + u * math.log(high))
    return (1 - u) * low + u * high


@st.composite
def grads(draw: st.DrawFn, bounded: bool = False, scalar: bool = False) -> Grad:
    shape = () if scalar else draw(st.sampled_from([(), (3,), (2, 2)]))
    schedule = None if scalar else draw(st.sampled_from([None, None, 3]))
    scale: Any = draw(st.sampled_from(["linear", "log", "simplex"] if shape else ["linear", "log"]))
    if scale == "simplex":
        weights = draw(st.lists(st.floats(0.1, 1), min_size=shape[-1], max_size=shape[-1]))
        row = [w / sum(weights) for w in weights]
        point: Any = row if len(shape) == 1 else [row] * shape[0]
        return Grad(point, scale="simplex", shape=shape, schedule=schedule)
    log = scale == "log"
    low, high = draw(bounds(log))
    init = between(low, high, log, draw(_unit))
    has_low, has_high = (True, True) if bounded else draw(st.tuples(st.booleans(), st.booleans()))
    return Grad(
        init,
        low if has_low else None,
        high if has_high else None,
        scale,
        shape=shape,
        schedule=schedule,
    )


@st.composite
def floats(draw: st.DrawFn) -> Float:
    log = draw(st.booleans())
    low, high = draw(bounds(log))
    return Float(low, high, log, default=between(low, high, log, draw(_unit)))


@st.composite
def ints(draw: st.DrawFn) -> Int:
    log = draw(st.booleans())
    low = draw(st.integers(1 if log else -20, 50))
    step = 1 if log else draw(st.integers(1, 5))
    count = draw(st.integers(1, 40))
    return Int(low, low + step * count, log, step, low + step * draw(st.integers(0, count)))


_options = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(-2, 2), st.text(max_size=6)
)


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    values = draw(st.lists(_options, min_size=1, max_size=4, unique_by=str))
    kept: list[Any] = []
    for value in values:
        if all(value != other for other in kept):
            kept.append(value)
    return Choice(*kept, default=draw(st.sampled_from(kept)))


_constants = st.recursive(_options, lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@st.composite
def spaces(draw: st.DrawFn, *, only_sampled: bool = False) -> Space:
    """Spaces with up to six names, some tensor-valued, some under a condition."""
    domains: dict[str, Domain] = {}
    if only_sampled:
        kinds: Any = st.one_of(floats(), ints(), choices(), st.builds(Switch, st.booleans()))
    else:
        kinds = st.one_of(
            grads(bounded=draw(st.booleans())),
            floats(),
            ints(),
            choices(),
            st.builds(Switch, st.booleans()),
            st.builds(Fixed, _constants),
        )
    for i in range(draw(st.integers(1, 6))):
        domain = draw(kinds)
        deciders = {n: d for n, d in domains.items() if isinstance(d, Choice | Switch | Int)}
        if deciders and draw(st.booleans()):
            name = draw(st.sampled_from(sorted(deciders)))
            decider = deciders[name]
            if isinstance(decider, Choice):
                values: list[Any] = draw(
                    st.lists(
                        st.sampled_from(range(len(decider.values))), min_size=1, unique=True
                    ).map(lambda indices, d=decider: [d.values[k] for k in indices])
                )
            elif isinstance(decider, Switch):
                values = [draw(st.booleans())]
            else:
                values = [decider.low, decider.high]
            domain = domain.under({name: tuple(values)})
        domains[f"h{i}"] = domain
    return Space(domains)


@st.composite
def owned(draw: st.DrawFn) -> Space:
    """Spaces with an arbitrary owner that each domain accepts."""
    space = draw(spaces())
    owners = {}
    for name, domain in space.items():
        fitting = [o for o in ("grad", "sampler", "shared", "fixed") if domain.refusal(o) is None]
        owners[name] = draw(st.sampled_from(fitting))
    return space.own(**owners)
