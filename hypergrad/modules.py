"""A copy of a module over other tensors, which are functions of something."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["view"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def view(module: ModuleT, tensors: Mapping[str, Tensor]) -> ModuleT:
    """Return a copy of a module in which `tensors` are the parameters, graph and all.

    Everything refers to the new tensors: tied parameters, parametrizations, the weight lists of
    recurrent layers, bound hooks.  Buffers are copies; parameters that are not given, and random
    generators, are shared.
    """
    memo: dict[int, Any] = {id(p): tensors.get(k, p) for k, p in module.named_parameters()}
    for part in module.modules():
        for value in vars(part).values():
            # What a forward pass left as an attribute (a pruned weight) cannot be copied.
            if isinstance(value, torch.Generator) or (
                isinstance(value, Tensor) and not value.is_leaf
            ):
                memo[id(value)] = value
    return copy.deepcopy(module, memo)
