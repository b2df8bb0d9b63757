"""Options and constants: `Choice`, `Switch` and `Fixed`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, ClassVar

from bilevel.conditions import Option, as_option, same
from bilevel.domains.base import Domain, as_scalar, discrete_refusal

__all__ = ["Choice", "Fixed", "Switch"]


@dataclass(frozen=True, repr=False, init=False)
class Choice(Domain):
    """One of several options without order, owned by the sampler.

    Attributes:
        values: the options: None, bools, numbers or strings.
        default: the first option unless given.

    Raises:
        TypeError: an option of another type.
        ValueError: no options, the same option twice, or a default that is none of them.
    """

    default_owner: ClassVar[str] = "sampler"

    values: tuple[Option, ...]
    default: Option

    def __init__(
        self,
        *values: Option,
        default: Option | EllipsisType = ...,
        when: Mapping[str, Any] | None = None,
        doc: str = "",
    ) -> None:
        if not values:
            raise ValueError("Choice: needs at least one option, but got none.")
        if len(values) == 1 and isinstance(values[0], Sequence) and not isinstance(values[0], str):
            raise TypeError(
                f"Choice: options are separate arguments; write Choice(*{values[0]!r})."
            )
        options = tuple(as_option("Choice: an option", value) for value in values)
        for i, option in enumerate(options):
            # 1, 1.0, True and "1" would be mixed up in tables and stored names.
            twin = next((o for o in options[:i] if str(o) == str(option) or o == option), ...)
            if twin is not ...:
                raise ValueError(
                    f"Choice: options must differ as printed and by ==, "
                    f"but got {twin!r} and {option!r}."
                )
        chosen = options[0] if default is ... else as_option("Choice: default", default)
        self._set(values=options, default=chosen, when=when or {}, doc=doc)
        super().__post_init__()
        self.check("Choice: default", chosen)

    @property
    def default_value(self) -> Option:
        """The option where none is given."""
        return self.default

    def check(self, name: str, value: Any) -> Option:
        """Return the option; see `Domain.check`."""
        given = as_option(name, as_scalar(value))
        for option in self.values:
            if same(option, given):
                return option
        raise ValueError(f"{name} must be one of {list(self.values)}, but got {value!r}.")

    def refusal(self, owner: str) -> str | None:
        """See `Domain.refusal`."""
        return discrete_refusal(self, owner)

    def __repr__(self) -> str:
        shown = [repr(value) for value in self.values]
        if not same(self.default, self.values[0]):
            shown.append(f"default={self.default!r}")
        if self.when:
            shown.append(f"when={self.when!r}")
        if self.doc:
            shown.append(f"doc={self.doc!r}")
        return f"Choice({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class Switch(Domain):
    """True or False, owned by the sampler.

    Attributes:
        default: the value where none is given.
    """

    default_owner: ClassVar[str] = "sampler"

    default: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("Switch: default", self.default)

    @property
    def default_value(self) -> bool:
        """The value where none is given."""
        return self.default

    def check(self, name: str, value: Any) -> bool:
        """Return a bool; see `Domain.check`."""
        value = as_scalar(value)
        if not isinstance(value, bool):
            kind = type(value).__name__
            raise TypeError(f"{name} must be True or False, but got {value!r} ({kind}).")
        return value

    def refusal(self, owner: str) -> str | None:
        """See `Domain.refusal`."""
        return discrete_refusal(self, owner)


@dataclass(frozen=True, repr=False)
class Fixed(Domain):
    """A constant, owned by nobody.

    Attributes:
        value: None, a bool, a number, a string, or nested tuples of them (lists become tuples).
    """

    default_owner: ClassVar[str] = "fixed"

    value: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(value=self.check("Fixed: value", self.value))

    @property
    def default_value(self) -> Any:
        """The constant."""
        return self.value

    def check(self, name: str, value: Any) -> Any:
        """Return the value with lists as tuples; see `Domain.check`."""
        if isinstance(value, tuple | list):
            return tuple(self.check(f"{name}[{i}]", part) for i, part in enumerate(value))
        return as_option(name, value)

    def refusal(self, owner: str) -> str | None:
        """See `Domain.refusal`."""
        return None if owner == "fixed" else "it is declared as a constant, without a range"
