"""What a `Solver` is made of: its update rule, and checks of what goes with which method."""

from __future__ import annotations

from typing import Any, cast

import optree
import torch

from hypergrad.fixed_point import FixedPoint
from hypergrad.implicit import Implicit
from hypergrad.optimizers import Hyper, Optimizer, as_optimizer, from_torch
from hypergrad.optimizers.values import is_zero
from hypergrad.proximal_gradient import ProximalGradient
from hypergrad.training import check_steps
from hypergrad.tree import Tree
from hypergrad.unrolled import Unrolled

__all__ = ["check_method", "update_rule"]


def update_rule(optimizer: Any, options: dict[str, Any], params: Tree) -> Optimizer:
    """Return the update rule that the arguments of a `Solver` describe."""
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        return optimizer(**options)
    if isinstance(optimizer, type):
        return from_torch(optimizer, **options)
    if isinstance(optimizer, torch.optim.Optimizer):
        return from_torch(optimizer, params, **options)
    rule = as_optimizer(optimizer)
    if rule is None or options:
        raise TypeError(
            "options go with a class of torch.optim, but optimizer is "
            f"{type(optimizer).__name__} and options are {options}."
        )
    return cast(Optimizer, rule)


def check_method(
    method: Any, steps: int | None, grad_norm: float | None, optimizer: Optimizer
) -> int:
    """Check the arguments that belong to a method; returns the number of steps."""
    if isinstance(method, Unrolled):
        if method.optimizer is not None:
            raise ValueError(
                "the optimizer is given twice: to the Solver and in "
                f"method=Unrolled({method.optimizer!r}, ...); write Unrolled(steps={method.steps})."
            )
        if steps is not None or grad_norm is not None:
            raise ValueError(
                "Unrolled differentiates its own steps; write method=Unrolled(steps=...), without "
                f"steps={steps} and grad_norm={grad_norm}."
            )
        return method.steps
    if not isinstance(method, Implicit):
        raise TypeError(
            "method must be Unrolled(...) or Implicit(...), whose derivative is a function of w "
            f"alone, but got {method!r}; other estimators are called with a Problem."
        )
    if steps is None:
        raise ValueError(
            "Implicit differentiates at a solution; say how long to train, such as steps=1000 or "
            "steps=1000, grad_norm=1e-6."
        )
    if isinstance(method.operator, FixedPoint | ProximalGradient):
        raise ValueError(
            f"{type(method.operator).__name__} is not what an optimizer on the loss converges to; "
            "solve it yourself and call Implicit with a Problem."
        )
    check_steps("Solver", steps)
    if grad_norm is not None and not grad_norm > 0:
        raise ValueError(f"grad_norm must be positive, but got {grad_norm}.")
    for name, value in optimizer.hyperparameters.items():
        if any(isinstance(leaf, Hyper) for leaf in optree.tree_leaves(value)):
            raise ValueError(
                f"{name} of the optimizer is a Hyper, but Implicit differentiates the minimum of "
                "the loss, which does not depend on it; use Unrolled, or put it into the loss."
            )
        if name == "weight_decay" and not is_zero(value):
            raise ValueError(
                f"the optimizer has weight_decay={value}, but Implicit differentiates the minimum "
                "of the loss; add the penalty to the loss instead."
            )
    return steps
