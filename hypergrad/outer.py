"""The outer level's part of every hypergradient: F, its two gradients, and the final sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hypergrad.problem import Problem, check_finite, evaluate
from hypergrad.tree import Leaves, Tree, zeros_for_none

__all__ = ["outer_gradients", "total_gradient"]


def outer_gradients(
    problem: Problem, params: Leaves, hparams: Leaves, batch: Any
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Return F, ∂F/∂w, and ∂F/∂h with None where F does not depend on a hyperparameter.

    Raises:
        ValueError: F depends on no parameter.
        TypeError, FloatingPointError: see `evaluate`; a gradient that is not finite.
    """
    with torch.enable_grad():
        value = evaluate(problem.outer_loss, "outer_loss", params, hparams, batch)
        inputs = [*params.tensors, *hparams.tensors]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if value.requires_grad:
            found = torch.autograd.grad(value, inputs, allow_unused=True)
    in_params, direct = found[: len(params.tensors)], list(found[len(params.tensors) :])
    if all(g is None for g in in_params):
        raise ValueError(
            f"outer_loss depends on none of the parameters {params.names}; "
            "was it computed under no_grad, or with a detached tensor?"
        )
    grads = zeros_for_none(in_params, params.tensors)
    check_finite(grads, params.names, "the gradient of outer_loss")
    return value.detach(), grads, direct


def total_gradient(
    hparams: Leaves, direct: Sequence[Tensor | None], indirect: Sequence[Tensor | None], hint: str
) -> Tree:
    """Return ∂F/∂h plus the part through the weights, in at least float32.

    Raises:
        ValueError: a hyperparameter has neither part; names it and adds `hint`.
        FloatingPointError: an entry is not finite.
    """
    total = []
    for name, leaf, *parts in zip(hparams.names, hparams.tensors, direct, indirect, strict=True):
        given = [p for p in parts if p is not None]
        if not given:
            raise ValueError(f"{name} enters neither the inner nor the outer loss{hint}.")
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        total.append(sum((p.to(dtype) for p in given), torch.zeros_like(leaf, dtype=dtype)))
    check_finite(total, hparams.names, "the hypergradient")
    return hparams.rebuild(total)
