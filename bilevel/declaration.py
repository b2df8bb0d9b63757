"""The declarative half of a space: names, domains, conditions, and an owner for each name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from bilevel.checks import did_you_mean
from bilevel.dependencies import decision_order
from bilevel.domains import Domain, Fixed, Grad
from bilevel.owners import check_owner, plain

__all__ = ["Declaration"]


class Declaration(Mapping[str, Domain]):
    """An immutable mapping from names to domains, with an owner for each; see `bilevel.Space`."""

    def __init__(self, domains: Mapping[str, Domain] | None = None, /, **named: Domain) -> None:
        twice = sorted(set(domains or {}) & set(named))
        if twice:
            raise ValueError(f"Space: names must be unique, but got {twice[0]!r} twice.")
        self._domains: dict[str, Domain] = {**(domains or {}), **named}
        for name, domain in self._domains.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"Space: a name must be a Python identifier, but got {name!r}.")
            if not isinstance(domain, Domain):
                raise TypeError(
                    f"Space: {name} must be a domain (Grad, Float, Int, Choice, Switch or Fixed), "
                    f"but got {domain!r}."
                )
        self._order = decision_order(self._domains)
        self._owners: dict[str, str] = {n: d.default_owner for n, d in self._domains.items()}
        self._constants: dict[str, Any] = {
            n: d.value for n, d in self._domains.items() if isinstance(d, Fixed)
        }

    def __getitem__(self, name: str) -> Domain:
        return self._domains[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._domains)

    def __len__(self) -> int:
        return len(self._domains)

    # Owners.

    def owner(self, name: str) -> str:
        """Return "grad", "sampler", "shared" or "fixed"."""
        self._known([name], "owner")
        return self._owners[name]

    @property
    def grad(self) -> tuple[str, ...]:
        """Names that the hypergradient moves."""
        return self._names("grad")

    @property
    def sampled(self) -> tuple[str, ...]:
        """Names that a sampler sets at the start of a trial, one by one or shared."""
        return self._names("sampler", "shared")

    @property
    def fixed(self) -> tuple[str, ...]:
        """Names that nothing moves."""
        return self._names("fixed")

    @property
    def constants(self) -> dict[str, Any]:
        """The value of each fixed name, as numbers, strings or nested tuples."""
        return dict(self._constants)

    @property
    def order(self) -> tuple[str, ...]:
        """All names so that each comes after those that decide whether it is active."""
        return self._order

    def own(self, **owners: str) -> Self:
        """Return the space with other owners; going back gives the space as it was.

        Args:
            owners: name -> "grad"; "sampler", which for a tensor means one dimension per
                element; "shared", one sampled value for all elements of a tensor; or "fixed", at
                the default.

        Raises:
            ValueError: unknown name or owner, or an owner that the domain cannot have.
        """
        self._known(owners, "own")
        constants = dict(self._constants)
        for name, owner in owners.items():
            check_owner(name, self[name], owner)
            if owner == "fixed":
                value = self[name].check(name, self[name].default_value)
                constants.setdefault(name, plain(value))
        return self._with(self._domains, {**self._owners, **owners}, constants)

    def fix(self, **values: Any) -> Self:
        """Return the space with names fixed at the given values.

        Raises:
            TypeError: a value of another type than the domain's.
            ValueError: unknown name, or a value outside its domain.
        """
        self._known(values, "fix")
        constants = {name: plain(self[name].check(name, value)) for name, value in values.items()}
        owners = {**self._owners, **dict.fromkeys(values, "fixed")}
        return self._with(self._domains, owners, {**self._constants, **constants})

    # Other spaces.

    def __or__(self, other: Mapping[str, Domain]) -> Self:
        twice = [name for name in other if name in self]
        if twice:
            raise ValueError(f"Space: {twice[0]!r} is in both spaces; names must be unique.")
        union = type(self)({**self, **other})
        parts = (self, other) if isinstance(other, Declaration) else (self,)
        for part in parts:
            union._owners.update(part._owners)
            union._constants.update(part._constants)
        return union

    def select(self, *names: str) -> Self:
        """Return the space of some names, in the order of this space."""
        self._known(names, "select")
        return self._with({n: d for n, d in self.items() if n in names})

    def without(self, *names: str) -> Self:
        """Return the space without some names."""
        self._known(names, "without")
        return self.select(*(name for name in self if name not in names))

    def reshape(self, **shapes: tuple[int, ...]) -> Self:
        """Return the space with other shapes of `Grad` domains, such as one value per parameter.

        Raises:
            TypeError: a name that is not a `Grad`.
            ValueError: unknown name, or an init or fixed value that is a tensor of another shape.
        """
        self._known(shapes, "reshape")
        domains = dict(self._domains)
        for name, shape in shapes.items():
            domain = self[name]
            if not isinstance(domain, Grad):
                raise TypeError(f"reshape: {name} must be a Grad, but is a {domain.kind}.")
            domains[name] = dataclasses.replace(domain, shape=shape)
        for name in shapes:
            check_owner(name, domains[name], self._owners[name])
        return self._with(domains)

    # Inside.

    def _names(self, *owners: str) -> tuple[str, ...]:
        return tuple(name for name, owner in self._owners.items() if owner in owners)

    def _known(self, names: Iterable[str], method: str) -> None:
        for name in names:
            if name not in self._domains:
                raise ValueError(f"{method}: unknown name {name!r}; {did_you_mean(name, self)}")

    def _with(
        self,
        domains: Mapping[str, Domain],
        owners: Mapping[str, str] | None = None,
        constants: Mapping[str, Any] | None = None,
    ) -> Self:
        space = type(self)(domains)
        owners = self._owners if owners is None else owners
        constants = self._constants if constants is None else constants
        space._owners = {name: owners[name] for name in space}
        space._constants = {n: constants[n] for n in space if space._owners[n] == "fixed"}
        return space
