"""Objects by name in a study file: algorithms, samplers, pruners, and a learner's changed space."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, cast

from bilevel.algorithm import OuterAlgorithm
from bilevel.checks import did_you_mean
from bilevel.domains import Choice, Domain
from bilevel.space import Space
from studies.plan import PlanError

__all__ = [
    "call",
    "changed_space",
    "check_keys",
    "make_algorithm",
    "make_from",
    "make_pruner",
    "make_sampler",
    "named",
]


def make_algorithm(value: Any) -> OuterAlgorithm[Any]:
    """Return the outer algorithm of ``"MAID"`` or ``{name = "Descent", lr = 0.1}``.

    Raises:
        PlanError: an unknown name or option, a value that the algorithm refuses.
    """
    from studies.commands.listing import algorithm_classes

    return cast("OuterAlgorithm[Any]", _object(value, algorithm_classes(), "algorithm"))


def make_from(module: ModuleType, value: Any, where: str) -> Any:
    """Return an object of one of the configurations of a module.

    Raises:
        PlanError: an unknown name or option, or a value that is refused.
    """
    public = {name: getattr(module, name) for name in module.__all__}
    found = {n: k for n, k in public.items() if dataclasses.is_dataclass(k)}
    known = {n: k for n, k in found.items() if not inspect.isabstract(k)}
    name, options = named(value, where)
    if name not in known:
        raise PlanError(f"{where}: unknown name {name!r}; {did_you_mean(name, known)}")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return call(cast("Callable[..., Any]", known[name]), options, f"{where} ({name})")


def _object(value: Any, known: Mapping[str, type], where: str) -> Any:
    name, options = named(value, where)
    if name not in known:
        raise PlanError(f"{where}: unknown name {name!r}; {did_you_mean(name, known)}")
    kind = known[name]
    values = {key: _argument(kind, key, part, where) for key, part in options.items()}
    return call(kind, values, f"{where} ({name})")


def _argument(kind: type, key: str, value: Any, where: str) -> Any:
    """An argument of a configuration: objects by name, `torch.optim` classes for outer steps."""
    where = f"{where}.{key}"
    if key == "optimizer" and issubclass(kind, OuterAlgorithm):
        return _outer_optimizer(value, where)
    classes = _config_classes()
    if (isinstance(value, Mapping) and "name" in value) or (
        isinstance(value, str) and value in classes
    ):
        return _object(value, classes, where)
    return tuple(value) if isinstance(value, list) else value


def _config_classes() -> dict[str, type]:
    import bilevel
    import hypergrad
    from bilevel import inexact

    modules = (inexact, bilevel, hypergrad)
    named = [(name, getattr(m, name)) for m in modules for name in m.__all__]
    return {name: kind for name, kind in named if dataclasses.is_dataclass(kind)}  # type: ignore[misc]


def _outer_optimizer(value: Any, where: str) -> Any:
    import torch

    name, options = named(value, where)
    found = {n: k for n, k in vars(torch.optim).items() if inspect.isclass(k)}
    known = {n: k for n, k in found.items() if issubclass(k, torch.optim.Optimizer)}
    if name not in known:
        raise PlanError(f"{where}: unknown name {name!r}; {did_you_mean(name, known)}")
    check_keys(options, list(inspect.signature(known[name]).parameters), where)
    return functools.partial(known[name], **options) if options else known[name]


def make_sampler(value: Any, seed: int) -> Any:
    """Return the name of a sampler, or the sampler where it has options.

    Raises:
        PlanError: an unknown name or option, a value that the sampler refuses.
    """
    from studies.sampling.samplers import SAMPLERS

    name, options = _of_optuna(value, SAMPLERS, "sampler")
    if not options:
        return name
    return call(type(SAMPLERS[name](seed)), {"seed": seed, **options}, f"sampler ({name})")


def make_pruner(value: Any) -> Any:
    """Return the name of a pruner, or the pruner where it has options.

    Raises:
        PlanError: an unknown name or option, a value that the pruner refuses.
    """
    from studies.sampling import samplers

    name, options = _of_optuna(value, samplers.PRUNERS, "pruner")
    if not options:
        return name
    if name == "patient":
        inner = make_pruner(options.get("wrapped_pruner", "none"))
        try:
            options["wrapped_pruner"] = samplers.make_pruner(inner)
        except ValueError as error:
            raise PlanError(f"pruner.wrapped_pruner: {error}") from error
    return call(samplers.PRUNERS[name], options, f"pruner ({name})")


def _of_optuna(value: Any, known: Mapping[str, Any], what: str) -> tuple[str, dict[str, Any]]:
    """Name and options; a name without options is checked by the study."""
    name, options = named(value, what)
    if options and name not in known:
        raise PlanError(f"{what}: unknown name {name!r}; {did_you_mean(name, known)}")
    return name, options


def changed_space(space: Space, changes: Mapping[str, Any]) -> Space:
    """Return a space with other owners, ranges or fixed values.

    Args:
        space: the learner's.
        changes: name -> value that fixes it, or a table with an ``owner``, a ``value``, and
            fields of its domain such as ``low`` and ``high``.

    Raises:
        PlanError: an unknown name or field, a value that the domain refuses.
    """
    owners: dict[str, str] = {}
    values: dict[str, Any] = {}
    domains: dict[str, Domain] = dict(space)
    for name, change in changes.items():
        where = f"[space] {name}"
        if name not in space:
            raise PlanError(f"[space]: unknown name {name!r}; {did_you_mean(name, space)}")
        if not isinstance(change, Mapping):
            values[name] = change
            continue
        fields = dict(change)
        if "owner" in fields:
            owners[name] = fields.pop("owner")
        if "value" in fields:
            values[name] = fields.pop("value")
        if fields:
            domains[name] = _changed(space[name], fields, where)
    kept = {n: space.owner(n) for n in space if space.owner(n) != "fixed"}
    constants = {n: v for n, v in space.constants.items() if n not in owners}
    try:
        return Space(domains).own(**{**kept, **owners}).fix(**{**constants, **values})
    except (TypeError, ValueError) as error:
        raise PlanError(f"[space]: {error}") from error


def _changed(domain: Domain, fields: dict[str, Any], where: str) -> Domain:
    known = [f.name for f in dataclasses.fields(domain)]
    check_keys(fields, ["owner", "value", *known], where)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        if isinstance(domain, Choice):
            now = {f: getattr(domain, f) for f in known} | fields
            if "default" not in fields and now["default"] not in now["values"]:
                del now["default"]
            return Choice(*now.pop("values"), **now)
        return dataclasses.replace(domain, **fields)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{where}: {error}") from error


# Small tools.


def named(value: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of ``"name"`` or ``{name = "name", option = ...}``.

    Raises:
        PlanError: another form.
    """
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping):
        raise PlanError(f"{where} must be a name or a table with a name, but got {value!r}.")
    options = dict(value)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise PlanError(f"{where}: the table needs a name, but has {sorted(value)}.")
    return name, options


def check_keys(given: Mapping[str, Any], known: list[str], where: str) -> None:
    """Refuse unknown keys.

    Raises:
        PlanError: names the key and what it may have meant.
    """
    for key in given:
        if key not in known:
            raise PlanError(f"{where}: unknown key {key!r}; {did_you_mean(key, known)}")


def call(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> Any:
    """Return what a function or class makes of options.

    Raises:
        PlanError: an unknown option, or a value that it refuses.
    """
    check_keys(options, list(inspect.signature(function).parameters), where)
    try:
        return function(**options)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{where}: {error}") from error
