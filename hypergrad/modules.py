"""Modules with other tensors in place of their parameters: for one call, or as a lasting view."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["call_with", "view"]

T = TypeVar("T")


class _Call(nn.Module):
    """Runs ``function(module)`` as a forward, for `functional_call`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.module)


def call_with(
    module: nn.Module, tensors: Mapping[str, Tensor], function: Callable[[nn.Module], T]
) -> T:
    """Return ``function(module)``, run while `tensors` stand in for parameters of the module.

    Any method, hook or parametrization of it sees them, and copies of its buffers.  Names that
    are not given keep their parameters; tied parameters are one, under their first name.
    """
    swapped = {f"module.{name}": b.detach().clone() for name, b in module.named_buffers()}
    swapped |= {f"module.{name}": t for name, t in tensors.items()}
    found: T = torch.func.functional_call(_Call(module), swapped, (function,), tie_weights=True)
    return found


def view(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a module in which `tensors` are the parameters, graph and all.

    Everything refers to the new tensors: tied parameters, parametrizations, the weight lists of
    recurrent layers, bound hooks.  Buffers are copies; parameters that are not given are shared.
    """
    memo: dict[int, Any] = {id(p): tensors.get(k, p) for k, p in module.named_parameters()}
    for part in module.modules():
        # What a forward pass left as an attribute (a pruned weight) is no leaf and not copied.
        kept = [v for v in vars(part).values() if isinstance(v, Tensor) and not v.is_leaf]
        memo.update({id(v): v for v in kept})
    return copy.deepcopy(module, memo)
