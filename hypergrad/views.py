"""Gradients of losses with stop-gradients, kept differentiable: the two-view step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from hypergrad.tree import Tree, zeros_for_none

__all__ = ["TwoViewLoss", "two_view_grad"]


def two_view_grad(loss: Callable[[Tree, Tree], Tensor], params: Tree) -> tuple[Tensor, Tree]:
    """Return ℓ(p, p) and g(p) = ∂₁ℓ(p₁; p₂) at p₁ = p₂ = p, both differentiable in p.

    A loss that detaches a quantity computed from its parameters, such as a confidence that
    weights the samples, trains with g(p) = ∂₁ℓ(p; stop_gradient(p)).  An unrolled or implicit
    hypergradient needs dg/dp = ∂₁₁ℓ + ∂₂₁ℓ, and `detach` drops ∂₂₁ℓ.  Here the detached
    quantities are computed from a second view p₂ of the parameters instead: the value and the
    gradient are the same, and the second derivative is complete.

    Args:
        loss: ``(moving, frozen) -> scalar``; computes from `frozen` what would be detached.
        params: tree of tensors.  Leaves that do not require grad get a zero gradient.

    Returns:
        The loss, and the gradient as a tree like `params`; with a graph (`create_graph=True`).

    Raises:
        ValueError: no leaf of `params` requires grad.

    Example:
        >>> p = torch.tensor(2.0, requires_grad=True)
        >>> _, g = two_view_grad(lambda p, q: q * p**2, p)  # stands for p.detach() * p**2
        >>> g.item(), torch.autograd.grad(g, p)[0].item()  # g(p) = 2p², g'(p) = 4p
        (8.0, 8.0)
    """
    leaves, spec = optree.tree_flatten(params)
    if not any(leaf.requires_grad for leaf in leaves):
        raise ValueError("params: no tensor requires grad, so there is no gradient to take.")
    with torch.enable_grad():
        moving = [leaf.view_as(leaf) for leaf in leaves]
        frozen = [leaf.view_as(leaf) for leaf in leaves]
        value = loss(optree.tree_unflatten(spec, moving), optree.tree_unflatten(spec, frozen))
        trained = [leaf for leaf in moving if leaf.requires_grad]
        found = torch.autograd.grad(value, trained, create_graph=True, allow_unused=True)
    grads = iter(zeros_for_none(found, trained))
    return value, optree.tree_unflatten(
        spec, [next(grads) if p.requires_grad else torch.zeros_like(p) for p in moving]
    )


@dataclass(frozen=True)
class TwoViewLoss:
    """An inner loss with stop-gradients, ``loss(moving, frozen, hparams, batch) -> scalar``.

    Used as the `inner_loss` of a `Problem`: estimators differentiate through `two_view_grad`;
    anything else that takes a plain gradient of it gets the same training gradient, because a
    call detaches the second view.

    Attributes:
        loss: computes from `frozen` every quantity that must carry no gradient.
    """

    loss: Callable[[Tree, Tree, Tree, Any], Tensor]

    def __call__(self, params: Tree, hparams: Tree, batch: Any) -> Tensor:
        """Return the loss at (params, params), without a gradient in the second."""
        frozen = optree.tree_map(torch.Tensor.detach, params)
        return self.loss(params, frozen, hparams, batch)
