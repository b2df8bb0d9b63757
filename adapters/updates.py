"""Update rules on edited gradients: `Method.after_backward` as part of the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hypergrad.optimizers import Optimizer, State, Value, Values
from hypergrad.optimizers.flat import unflatten
from hypergrad.tree import Leaves

if TYPE_CHECKING:
    from adapters.method import Method

__all__ = ["EditedGradient", "edited"]


@dataclass(frozen=True)
class EditedGradient(Optimizer):
    """w, s ← U(w, e(∇f(w), w), s): an update rule on an edited gradient.

    The edit is differentiated with the rule, so hypergradients through training are exact.

    Attributes:
        base: the rule U.
        edit: e, ``(grad, flat) -> grad`` on flat vectors; pure and differentiable.
    """

    base: Optimizer
    edit: Callable[[Tensor, Tensor], Tensor]

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """Those of the rule."""
        return self.base.hyperparameters

    def init(self, flat: Tensor) -> State:
        """See `Optimizer.init`."""
        return self.base.init(flat)

    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """See `Optimizer.update`."""
        return self.base.update(flat, self.edit(grad, flat), state, values)


def edited(rule: Optimizer, method: Method, leaves: Leaves, names: list[str]) -> Optimizer:
    """Return the rule with the method's `after_backward` before it, where it has one.

    Args:
        rule: the method's optimizer.
        method: edits gradients by name.
        leaves: the trained tensors, in the order of the flat vector.
        names: their names.
    """
    if type(method).after_backward.__qualname__ == "Method.after_backward":
        return rule

    def edit(grad: Tensor, flat: Tensor) -> Tensor:
        grads = dict(zip(names, unflatten(grad, leaves.tensors), strict=True))
        params = dict(zip(names, unflatten(flat, leaves.tensors), strict=True))
        after = method.after_backward(grads, params)
        return torch.cat([after[name].reshape(-1) for name in names])

    return EditedGradient(rule, edit)
