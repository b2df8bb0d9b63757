"""Conditions between names: checked as a whole, and the order in which they can be decided."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

from bilevel.checks import did_you_mean
from bilevel.domains import Choice, Domain, Fixed, Int, Switch

__all__ = ["decision_order"]


def decision_order(domains: Mapping[str, Domain]) -> tuple[str, ...]:
    """Return the names so that each comes after those it depends on, else as declared.

    Raises:
        TypeError: a condition on a domain that cannot decide one, or a value of another type.
        ValueError: a condition on an unknown name or an impossible value, or a cycle.
    """
    for name, domain in domains.items():
        for parent, options in domain.condition.items():
            what = f"{name}: when[{parent!r}]"
            if parent not in domains:
                hint = did_you_mean(parent, (n for n in domains if n != name))
                raise ValueError(f"{what} refers to an unknown name; {hint}")
            decider = domains[parent]
            if not isinstance(decider, Choice | Switch | Int | Fixed):
                raise TypeError(
                    f"{what} must refer to a Choice, Switch, Int or Fixed, but {parent} is a "
                    f"{decider.kind}."
                )
            for option in options:
                value = decider.check(what, option)
                if isinstance(decider, Fixed) and value != decider.value:
                    raise ValueError(f"{what} must be {decider.value!r}, but got {option!r}.")
    graph = {name: tuple(domain.condition) for name, domain in domains.items()}
    try:
        rank = {name: i for i, name in enumerate(TopologicalSorter(graph).static_order())}
    except CycleError as error:
        path = " -> ".join(reversed(error.args[1]))
        raise ValueError(f"when: conditions must not form a cycle, but got {path}.") from error
    depth: dict[str, int] = {}
    for name in sorted(domains, key=rank.__getitem__):
        depth[name] = 1 + max((depth[parent] for parent in graph[name]), default=-1)
    return tuple(sorted(domains, key=depth.__getitem__))
