"""One step of a `torch.optim` optimizer, from an explicit state to an explicit state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.checkpoint import copy

__all__ = ["OptimizerFactory", "optimizer_step"]

OptimizerFactory = Callable[..., torch.optim.Optimizer]
"""A `torch.optim` class, or a `functools.partial` of one."""


def optimizer_step(
    factory: OptimizerFactory,
    values: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    rates: Mapping[str, float],
    state: dict[str, Any] | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the next values and state; the arguments stay as they are.

    Args:
        factory: called with one parameter group for each name.
        values: tensors by name.
        grads: their gradients.
        rates: their learning rates.
        state: `state_dict` of the optimizer after the last step; None before the first.
    """
    moved = {name: value.detach().clone() for name, value in values.items()}
    groups = [{"params": [value], "lr": rates[name]} for name, value in moved.items()]
    optimizer = factory(groups)
    if state is not None:
        # load_state_dict keeps references to the tensors, and step changes them in place.
        saved = copy(state)
        for saved_group, group in zip(saved["param_groups"], groups, strict=True):
            saved_group["lr"] = group["lr"]
        optimizer.load_state_dict(saved)
    for name, value in moved.items():
        value.grad = grads[name].to(value)
    optimizer.step()
    for value in moved.values():
        value.grad = None
    return moved, optimizer.state_dict()
