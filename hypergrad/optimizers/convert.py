"""From an instance of `torch.optim` to the same rule here."""

from __future__ import annotations

from typing import Any

import optree
import torch

from hypergrad.optimizers.adam import Adam, AdamW
from hypergrad.optimizers.base import Optimizer
from hypergrad.optimizers.sgd import SGD
from hypergrad.optimizers.values import Value
from hypergrad.tree import Tree, leaf_names

__all__ = ["from_torch"]

_NUMBERS = {
    SGD: ("lr", "momentum", "dampening", "weight_decay"),
    Adam: ("lr", "betas", "eps", "weight_decay"),
}
_FLAGS = {SGD: ("nesterov", "maximize"), Adam: ("amsgrad", "maximize")}


def from_torch(optimizer: torch.optim.Optimizer, params: Tree) -> Optimizer:
    """Return the update rule of a `torch.optim` optimizer, with its parameter groups.

    Numbers that differ between groups become trees like `params`, with the same results bit for
    bit (betas that differ: to rounding, because a power is taken per element).  The optimizer's
    state is not taken over; its switches `foreach`, `fused`, `capturable` and `differentiable`
    choose an implementation, not a rule, and are ignored.

    Args:
        optimizer: a `torch.optim.SGD`, `Adam` or `AdamW` instance (no subclass).
        params: tree whose trained tensors are those of the optimizer, such as the one that
            `module_problem` returns.

    Raises:
        TypeError: another optimizer.
        ValueError: a trained tensor in no group, a flag that differs between groups, or a tensor
            hyperparameter that requires grad (put it in hparams and name it with `Hyper`).
    """
    supported = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
    if type(optimizer) not in supported:
        names = ", ".join(f"torch.optim.{c.__name__}" for c in supported)
        raise TypeError(f"optimizer must be one of {names}, but got {type(optimizer).__name__}.")
    groups = optimizer.param_groups
    kind: type[SGD] | type[Adam] = SGD if isinstance(optimizer, torch.optim.SGD) else Adam
    rule: Any = kind
    if isinstance(optimizer, torch.optim.AdamW) or _shared(groups, "decoupled_weight_decay", False):
        rule = AdamW
    flags = {name: _shared(groups, name, False) for name in _FLAGS[kind]}

    where = {id(p): group for group in groups for p in group["params"]}
    leaves, spec = optree.tree_flatten(params)
    chosen = []
    for leaf, name in zip(leaves, leaf_names(params, "params"), strict=True):
        if leaf.requires_grad and id(leaf) not in where:
            raise ValueError(f"{name} requires grad but is in no parameter group of the optimizer.")
        chosen.append(where.get(id(leaf), groups[0]))

    def spread(name: str, index: int | None = None) -> Value:
        values = [_number(group, name, index) for group in chosen]
        return values[0] if len(set(values)) == 1 else optree.tree_unflatten(spec, values)

    numbers: dict[str, Value] = {name: spread(name) for name in _NUMBERS[kind] if name != "betas"}
    if kind is Adam:
        numbers["betas"] = (spread("betas", 0), spread("betas", 1))
    return rule(**numbers, **flags)  # type: ignore[no-any-return]


def _number(group: dict[str, Any], name: str, index: int | None) -> float:
    value = group[name] if index is None else group[name][index]
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise ValueError(
            f"{name} of the optimizer is a tensor that requires grad; put it in hparams and write "
            f"the rule with {name}=Hyper(name) instead."
        )
    # torch ignores dampening where there is no momentum.
    if name == "dampening" and group["momentum"] == 0:
        return 0.0
    return float(value)


def _shared(groups: list[dict[str, Any]], name: str, default: bool) -> bool:
    values = {bool(group.get(name, default)) for group in groups}
    if len(values) > 1:
        raise ValueError(f"{name} must be the same in all parameter groups, but they differ.")
    return values.pop()
