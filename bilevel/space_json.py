"""Spaces as JSON: stored beside a study, hashed, and compared with what was stored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, TypeVar, cast

from bilevel.checks import did_you_mean
from bilevel.conditions import same
from bilevel.declaration import Declaration
from bilevel.domains import Choice, Domain, Fixed, Float, Grad, Int, Switch

__all__ = ["differences", "dumps", "fingerprint", "loads"]

S = TypeVar("S", bound=Declaration)

_FORMAT = 1
_KINDS: dict[str, type[Domain]] = {
    kind.__name__: kind for kind in (Grad, Float, Int, Choice, Switch, Fixed)
}


def dumps(space: Declaration) -> str:
    """Return a space as JSON text; floats keep every digit."""
    return json.dumps({"format": _FORMAT, "space": _entries(space)}, allow_nan=False, indent=1)


def loads(kind: type[S], text: str) -> S:
    """Return the space that `dumps` wrote.

    Raises:
        ValueError: no JSON, another format, or a domain that its class refuses.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"from_json: expected JSON text of a space, but {error}.") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"from_json: expected a space in format {_FORMAT}, but got {found!r}.")
    try:
        return _read(kind, data["space"])
    except KeyError as error:
        raise ValueError(f"from_json: the key {error.args[0]!r} is missing.") from error


def _read(kind: type[S], entries: dict[str, dict[str, Any]]) -> S:
    domains: dict[str, Domain] = {}
    owners: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for name, stored in entries.items():
        entry = dict(stored)
        owner, class_name = entry.pop("owner"), entry.pop("kind")
        if class_name not in _KINDS:
            raise ValueError(
                f"from_json: {name} has the unknown kind {class_name!r}; "
                f"{did_you_mean(class_name, _KINDS)}"
            )
        if owner == "fixed":
            constants[name] = entry.pop("fixed_at")
        else:
            owners[name] = owner
        options = entry.pop("values", ())
        try:
            domains[name] = _KINDS[class_name](*options, **entry)
        except TypeError as error:
            raise ValueError(f"from_json: {name} cannot be a {class_name}: {error}") from error
    return kind(domains).own(**owners).fix(**constants)


def fingerprint(space: Declaration) -> str:
    """Return the SHA-256 of what decides the meaning of values: all but the order and `doc`."""
    entries = _entries(space)
    for entry in entries.values():
        entry.pop("doc", None)
    text = json.dumps(entries, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(before: Declaration, after: Declaration) -> list[str]:
    """List what differs between two spaces, one line each, such as ``lr: high 1.0 -> 0.5``."""
    old, new = _entries(before), _entries(after)
    lines = []
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            lines.append(f"{name}: removed, was {before[name]!r}")
        elif name not in old:
            lines.append(f"{name}: added, {after[name]!r}")
        elif old[name]["kind"] != new[name]["kind"]:
            lines.append(f"{name}: {before[name]!r} -> {after[name]!r}")
        else:
            for field in dict.fromkeys([*old[name], *new[name]]):
                a, b = old[name].get(field), new[name].get(field)
                # As JSON, which tells 1 from True and from 1.0.
                if field != "doc" and json.dumps(a) != json.dumps(b):
                    lines.append(f"{name}: {field} {_short(a)} -> {_short(b)}")
    return lines


def _entries(space: Declaration) -> dict[str, dict[str, Any]]:
    return {name: _entry(space, name) for name in space}


def _entry(space: Declaration, name: str) -> dict[str, Any]:
    """One domain as plain data; fields at their default are left out."""
    domain = space[name]
    entry: dict[str, Any] = {"kind": domain.kind, "owner": space.owner(name)}
    for field in dataclasses.fields(domain):
        value = getattr(domain, field.name)
        if field.name == "when":
            if value:
                entry["when"] = {n: list(options) for n, options in value.items()}
        elif field.default is dataclasses.MISSING or not same(value, field.default):
            entry[field.name] = value
    if space.owner(name) == "fixed":
        entry["fixed_at"] = space.constants[name]
    return cast(dict[str, Any], json.loads(json.dumps(entry, allow_nan=False)))


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:50]}... ({len(shown)} characters)"
