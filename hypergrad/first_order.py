"""What methods without Hessian-vector products share: ∂f/∂h, its differences, common draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hypergrad.optimizers.flat import flatten, unflatten, widen
from hypergrad.problem import Problem, check_scalar, evaluate
from hypergrad.randomness import RandomState
from hypergrad.tree import Leaves, zeros_for_none
from hypergrad.views import TwoViewLoss

__all__ = [
    "check_precision",
    "check_value_function",
    "cross_difference",
    "devices",
    "hyper_gradient",
    "inner_gradients",
    "replayed",
    "weighted_difference",
]


def devices(*leaves: Leaves) -> set[torch.device]:
    """Return the devices that a loss of these leaves may draw random numbers on."""
    return {t.device for some in leaves for t in some.tensors}


@contextmanager
def replayed(random: RandomState) -> Iterator[None]:
    """Run a block with the draws that followed `random`; afterwards all is as before it."""
    with RandomState.capture(device for device, _ in random.others).restored_after():
        random.restore()
        yield


def inner_gradients(
    problem: Problem, params: Leaves, hparams: Leaves, batch: Any
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return f, ∇_w f as a flat vector, and ∂f/∂h with None where f does not depend on h.

    Raises:
        TypeError, FloatingPointError: see `evaluate`.
    """
    with torch.enable_grad():
        value = evaluate(problem.inner_loss, "inner_loss", params, hparams, batch)
        found = _grad(value, [*params.tensors, *hparams.tensors])
    split = len(params.tensors)
    return (
        value.detach(),
        flatten(zeros_for_none(found[:split], params.tensors)),
        found[split:],
    )


def hyper_gradient(
    problem: Problem, params: Leaves, hparams: Leaves, batch: Any
) -> tuple[Tensor, list[Tensor | None]]:
    """Return f and ∂f/∂h, with None where f does not depend on h.

    Raises:
        TypeError, FloatingPointError: see `evaluate`.
    """
    with torch.enable_grad():
        value = evaluate(problem.inner_loss, "inner_loss", params, hparams, batch)
        return value.detach(), _grad(value, hparams.tensors)


def weighted_difference(
    weight: float, ahead: Sequence[Tensor | None], behind: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return weight · (ahead − behind), in at least float32; None where both are unused."""
    found: list[Tensor | None] = []
    for a, b in zip(ahead, behind, strict=True):
        like = b if a is None else a
        if like is None:
            found.append(None)
            continue
        x, y = (widen(torch.zeros_like(like) if part is None else part) for part in (a, b))
        found.append(weight * (x - y))
    return found


def cross_difference(
    problem: Problem,
    params: Leaves,
    hparams: Leaves,
    batch: Any,
    direction: Tensor,
    length: float,
    random: RandomState,
) -> list[Tensor | None]:
    """Return (∂²f/∂w∂h)ᵀ d by a central difference; None where f does not depend on h:

        [∂f/∂h(w + εd, h) − ∂f/∂h(w − εd, h)] / (2ε),   ε = length / ‖d‖.

    Two gradients.  The error is O(ε²) and rounding; for f quadratic in w there is only rounding.
    Perturbed weights are copies, and both evaluations make the draws that followed `random`.
    Of a `TwoViewLoss` only the view that carries the gradient is moved.

    Args:
        problem: its inner loss is differentiated.
        params: w.
        hparams: h.
        batch: third argument of the loss.
        direction: d, a vector over all trained tensors.
        length: norm of the perturbation εd.
        random: state before the draws.
    """
    norm = float(direction.norm())
    # At d = 0 any ε gives the zero product, and still tells which hyperparameters enter f.
    epsilon = length / norm if norm > 0 else length
    ends = []
    for sign in (1.0, -1.0):
        with replayed(random):
            ends.append(_ahead(problem, params, hparams, batch, direction, sign * epsilon))
    return weighted_difference(0.5 / epsilon, *ends)


def check_precision(name: str, params: Leaves) -> None:
    """Refuse parameters too coarse for a difference of two nearby evaluations.

    Raises:
        ValueError: a trained tensor in bfloat16 or float16.
    """
    for tensor, leaf in zip(params.tensors, params.names, strict=True):
        if torch.finfo(tensor.dtype).bits < 32:
            raise ValueError(
                f"{name} takes differences of nearby evaluations, which rounding swamps in "
                f"{tensor.dtype} ({leaf}); keep float32 params, or use "
                "Unrolled or Implicit."
            )


def check_value_function(name: str, problem: Problem) -> None:
    """Refuse an inner level that does not minimize its loss.

    Raises:
        ValueError: the inner loss is a `TwoViewLoss`.
    """
    if isinstance(problem.inner_loss, TwoViewLoss):
        raise ValueError(
            f"{name} compares values of the inner loss with its minimum, but a TwoViewLoss is not "
            "what its gradient minimizes; use Unrolled or Implicit."
        )


def _ahead(
    problem: Problem,
    params: Leaves,
    hparams: Leaves,
    batch: Any,
    direction: Tensor,
    epsilon: float,
) -> list[Tensor | None]:
    """Return ∂f/∂h at w + εd."""
    here = [w.detach() for w in params.tensors]
    pieces = unflatten(direction, here)
    moved = [torch.add(w, d.to(w.dtype), alpha=epsilon) for w, d in zip(here, pieces, strict=True)]
    loss = problem.inner_loss
    if not isinstance(loss, TwoViewLoss):
        return hyper_gradient(problem, replace(params, tensors=moved), hparams, batch)[1]
    with torch.enable_grad():
        trees = params.rebuild(moved), params.rebuild(here)
        value = loss.loss(*trees, hparams.tree(), batch)
        check_scalar(value, "inner_loss")
        return _grad(value, hparams.tensors)


def _grad(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(value, inputs, allow_unused=True))
