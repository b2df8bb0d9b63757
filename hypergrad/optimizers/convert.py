"""From a class or an instance of `torch.optim` to the same rule here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import optree
import torch

from hypergrad.optimizers.adagrad import Adagrad
from hypergrad.optimizers.adam import Adam, AdamW
from hypergrad.optimizers.base import Optimizer
from hypergrad.optimizers.rmsprop import RMSprop
from hypergrad.optimizers.sgd import SGD
from hypergrad.optimizers.values import Value
from hypergrad.tree import Tree, leaf_names

__all__ = ["from_torch"]

TorchClass = type[torch.optim.Optimizer]

RULES: Mapping[TorchClass, type[Optimizer]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adagrad: Adagrad,
}
"""Our rule for a class of `torch.optim`; fields have the names of its options."""

_SWITCHES = ("foreach", "fused", "capturable", "differentiable")
"""Options that choose an implementation, not a rule."""


def from_torch(
    optimizer: torch.optim.Optimizer | TorchClass, params: Tree = None, /, **options: Value | bool
) -> Optimizer:
    """Return the update rule of a `torch.optim` class with options, or of an instance.

        from_torch(torch.optim.SGD, lr=0.1, momentum=Hyper("momentum"))
        from_torch(torch.optim.Adam(model.parameters(), lr=1e-3), dict(model.named_parameters()))

    Options of a class are those of its constructor, with the same defaults; a number may also be
    a tensor, a `Hyper` or a tree of these (see `Optimizer`), and each of the betas by itself.

    An instance brings its parameter groups: numbers that differ between them become trees like
    `params`, with the same results bit for bit (to rounding where betas differ, because a power
    is taken per element, and where only some groups of an RMSprop have momentum).  Its state is
    not taken over.

    The switches `foreach`, `fused`, `capturable` and `differentiable` choose an implementation,
    not a rule, and are ignored.

    Args:
        optimizer: `torch.optim.SGD`, `Adam`, `AdamW`, `RMSprop` or `Adagrad`, or an instance of
            one (no subclass).
        params: for an instance, the tree whose trained tensors are those of the optimizer, such
            as the one that `module_problem` returns.
        options: for a class, its options.

    Raises:
        TypeError: another optimizer; an option that the class does not have; params for a class;
            options, or no params, for an instance.
        ValueError: a trained tensor in no group, a flag that differs between groups, or a tensor
            hyperparameter that requires grad (put it in hparams and name it with `Hyper`).
    """
    if isinstance(optimizer, type):
        rule = _rule(optimizer)
        if params is not None:
            raise TypeError(
                f"from_torch({optimizer.__name__}, ...) takes options by name, such as lr=0.1, but "
                f"got a second positional argument of type {type(params).__name__}; params go with "
                "an instance."
            )
        return _from_class(optimizer, rule, options)
    rule, name = _rule(type(optimizer)), type(optimizer).__name__
    if options:
        raise TypeError(
            f"from_torch takes options with a class; this {name} has its own, but got "
            f"{', '.join(options)}. To change some, use dataclasses.replace on the result."
        )
    if params is None:
        raise TypeError(
            f"from_torch needs params with an instance, the tree that this {name} trains, such as "
            "dict(model.named_parameters())."
        )
    return _from_instance(optimizer, rule, params)


def _rule(kind: TorchClass) -> type[Optimizer]:
    if kind not in RULES:
        names = ", ".join(f"torch.optim.{c.__name__}" for c in RULES)
        name = getattr(kind, "__name__", repr(kind))
        raise TypeError(f"optimizer must be one of {names}, but got {name}.")
    return RULES[kind]


def _decoupled(rule: type[Optimizer], decoupled: bool) -> type[Optimizer]:
    """`torch.optim.Adam` has a flag that makes it AdamW."""
    return AdamW if rule is Adam and decoupled else rule


def _flags(rule: type[Optimizer]) -> list[str]:
    return [f.name for f in fields(rule) if isinstance(f.default, bool)]


def _from_class(kind: TorchClass, rule: type[Optimizer], options: dict[str, Any]) -> Optimizer:
    known = [f.name for f in fields(rule)]
    given = {k: v for k, v in options.items() if k not in _SWITCHES}
    for name in [*_flags(rule), "decoupled_weight_decay"]:
        if name in given and not isinstance(given[name], bool):
            raise TypeError(f"{kind.__name__} {name} must be True or False, got {given[name]!r}.")
    if rule is Adam:
        # Its decay is its own default in either form, unlike that of AdamW.
        given.setdefault("weight_decay", Adam.weight_decay)
        rule = _decoupled(rule, given.pop("decoupled_weight_decay", False))
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(
            f"torch.optim.{kind.__name__} has no option {unknown[0]!r} here; it has {known}."
        )
    return rule(**given)


def _from_instance(
    optimizer: torch.optim.Optimizer, rule: type[Optimizer], params: Tree
) -> Optimizer:
    groups = optimizer.param_groups
    flags = {name: _shared(groups, name) for name in _flags(rule)}
    if rule is Adam:
        rule = _decoupled(rule, _shared(groups, "decoupled_weight_decay"))

    where = {id(p): group for group in groups for p in group["params"]}
    leaves, spec = optree.tree_flatten(params)
    chosen = []
    for leaf, name in zip(leaves, leaf_names(params, "params"), strict=True):
        if leaf.requires_grad and id(leaf) not in where:
            raise ValueError(f"{name} requires grad but is in no parameter group of the optimizer.")
        chosen.append(where.get(id(leaf), groups[0]))

    def spread(name: str, index: int | None = None) -> Value:
        values = [_number(optimizer, group, name, index) for group in chosen]
        return values[0] if len(set(values)) == 1 else optree.tree_unflatten(spec, values)

    numbers: dict[str, Value] = {}
    for field in fields(rule):
        if field.name == "betas":
            numbers["betas"] = (spread("betas", 0), spread("betas", 1))
        elif field.name not in flags:
            numbers[field.name] = spread(field.name)
    return rule(**numbers, **flags)


def _number(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], name: str, index: int | None
) -> float:
    # Where torch reads another place than the group: one start for all accumulators, and no
    # dampening without momentum.
    if name == "initial_accumulator_value":
        group = optimizer.defaults
    if name == "dampening" and group["momentum"] == 0:
        return 0.0
    value = group[name] if index is None else group[name][index]
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise ValueError(
            f"{name} of the optimizer is a tensor that requires grad; put it in hparams and write "
            f"the rule with {name}=Hyper(name) instead."
        )
    return float(value)


def _shared(groups: list[dict[str, Any]], name: str) -> bool:
    values = {bool(group.get(name, False)) for group in groups}
    if len(values) > 1:
        raise ValueError(f"{name} must be the same in all parameter groups, but they differ.")
    return values.pop()
