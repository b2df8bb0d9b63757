"""A nested problem: two scalar losses over the same trees of parameters and hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hypergrad.attention import math_attention
from hypergrad.eager import eagerly, is_compiled
from hypergrad.swap import Swap
from hypergrad.traced import is_traced
from hypergrad.tree import Leaves, Tree, zeros_for_none
from hypergrad.views import TwoViewLoss, two_view_grad

__all__ = ["Loss", "ModuleProblem", "Problem", "inner_gradient", "module_problem"]

Loss = Callable[[Tree, Tree, Any], Tensor]
"""``(params, hparams, batch) -> scalar tensor``."""

ModuleLoss = Callable[[nn.Module, Tree, Any], Tensor]
"""``(module, hparams, batch) -> scalar tensor``."""


@dataclass(frozen=True)
class Problem:
    """min_h F(w*(h), h)  with  w*(h) = argmin_w f(w, h).

    Attributes:
        inner_loss: f, ``(params, hparams, batch) -> scalar tensor``.
        outer_loss: F, the same signature; it may depend on hparams directly.

    Both must be deterministic functions of their arguments for `check_hypergradient`; random
    draws (dropout, augmentation) belong to the batch or are seeded from it.

    Raises:
        TypeError: a loss is not callable.
    """

    inner_loss: Loss
    outer_loss: Loss

    def __post_init__(self) -> None:
        for name in ("inner_loss", "outer_loss"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"{name} must be a function (params, hparams, batch) -> scalar tensor, but got "
                    f"{getattr(self, name)!r}."
                )


@dataclass(frozen=True)
class ModuleProblem(Problem):
    """A `Problem` made from a module by `module_problem`; keeps the module and its two losses."""

    module: nn.Module
    module_inner_loss: ModuleLoss
    module_outer_loss: ModuleLoss


def module_problem(
    module: nn.Module, inner_loss: ModuleLoss, outer_loss: ModuleLoss
) -> tuple[ModuleProblem, dict[str, Tensor]]:
    """Return the problem over a module's parameters, and those parameters by name.

    The losses take the module itself, ``(module, hparams, batch) -> scalar``; any method,
    hook or parametrization of it sees the swapped parameters.

    Buffers: every evaluation works on copies, so BatchNorm running statistics are never
    changed by a hypergradient; in train mode BatchNorm normalizes by the batch, in eval mode
    by the module's own running statistics.
    Frozen parameters stay constant; tied parameters appear once, under their first name.
    A module under `torch.compile` runs eagerly in the inner loss: a compiled graph has no second
    derivative.  To save time, compile the hypergradient instead.
    """
    swap = Swap(module)
    compiled = is_compiled(module)

    def functional(loss: ModuleLoss, twice: bool) -> Loss:
        def evaluate(params: Tree, hparams: Tree, batch: Any) -> Tensor:
            with eagerly() if twice else nullcontext():
                return swap.call(params, lambda module: loss(module, hparams, batch))

        return evaluate

    problem = ModuleProblem(
        functional(inner_loss, compiled),
        functional(outer_loss, False),
        module,
        inner_loss,
        outer_loss,
    )
    return problem, dict(module.named_parameters())


def evaluate(
    loss: Loss, which: str, params: Leaves, hparams: Leaves, batch: Any, at: str = ""
) -> Tensor:
    """Evaluate a loss at the given leaves and check what it returned.

    Args:
        loss: the inner or the outer loss.
        which: its name for messages.
        params: leaves of the parameters.
        hparams: leaves of the hyperparameters.
        batch: passed through.
        at: where in a longer computation, for messages (such as ``" at step 3"``).

    Raises:
        TypeError: the loss returned something else than a scalar tensor.
        FloatingPointError: the loss is NaN or infinite.
    """
    value = loss(params.tree(), hparams.tree(), batch)
    check_scalar(value, which, at)
    return value


def inner_gradient(
    problem: Problem,
    params: Leaves,
    hparams: Leaves,
    batch: Any,
    at: str = "",
    create_graph: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Return f and ∇_w f at the given leaves; with `create_graph`, differentiable in w and h.

    A parameter that does not enter the loss gets a zero gradient.  A `TwoViewLoss` gets its
    two-view gradient.  Attention runs on the math backend, the only one with a second
    derivative.

    Raises:
        ValueError: the loss depends on none of the parameters.
        TypeError, FloatingPointError: see `evaluate`.
    """
    loss = problem.inner_loss
    with torch.enable_grad(), math_attention():
        if create_graph and isinstance(loss, TwoViewLoss):
            views, tree = loss.loss, hparams.tree()

            def two_views(moving: list[Tensor], frozen: list[Tensor]) -> Tensor:
                value = views(params.rebuild(moving), params.rebuild(frozen), tree, batch)
                check_scalar(value, "inner_loss", at)
                return value

            value, grads = two_view_grad(two_views, params.tensors)
            return value.detach(), grads
        value = evaluate(loss, "inner_loss", params, hparams, batch, at)
        found: Sequence[Tensor | None] = [None] * len(params.tensors)
        if value.requires_grad:
            found = torch.autograd.grad(
                value, params.tensors, create_graph=create_graph, allow_unused=True
            )
        if all(g is None for g in found):
            raise ValueError(
                f"inner_loss depends on none of the parameters {params.names}{at}; "
                "was it computed under no_grad, or with a detached tensor?"
            )
    return value.detach(), zeros_for_none(found, params.tensors)


def check_scalar(value: Any, which: str, at: str = "") -> None:
    """Check that a loss value is a finite floating scalar tensor; see `evaluate`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{which} must return a scalar tensor, but got {type(value).__name__}{at}.")
    if value.numel() != 1 or value.dim() > 1 or not value.is_floating_point():
        raise TypeError(
            f"{which} must return a floating scalar tensor, but got shape {tuple(value.shape)} "
            f"and dtype {value.dtype}{at}; reduce it with .mean() or .sum()."
        )
    if not is_traced() and not math.isfinite(value.item()):
        raise FloatingPointError(f"{which} is {value.item()}{at}; expected a finite number.")


def check_finite(grads: Sequence[Tensor], names: Sequence[str], what: str) -> None:
    """Raise FloatingPointError naming the first tensor with a NaN or an infinity."""
    if is_traced():
        return
    for grad, name in zip(grads, names, strict=True):
        if not bool(torch.isfinite(grad).all()):
            bad = int((~torch.isfinite(grad)).sum())
            raise FloatingPointError(
                f"{what} has {bad} non-finite of {grad.numel()} entries in {name}."
            )
