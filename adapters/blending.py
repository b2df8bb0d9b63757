"""Weights between and around two networks: blends, extrapolations, and quadratic anchors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["add_scaled", "blend", "fisher_diagonal", "quadratic_anchor"]

Weights = Mapping[str, Tensor]


def blend(
    start: Weights, end: Weights, weight: float | Tensor | Mapping[str, float | Tensor]
) -> dict[str, Tensor]:
    """Return (1 − w) θ₀ + w θ₁ by name; affine, and differentiable in w and both ends.

    dL/dw = ⟨∇L(θ_w), θ₁ − θ₀⟩ is exact without unrolling.  Tensors that are not floating, such
    as counters, are taken from the end.

    Args:
        start: θ₀ by name.
        end: θ₁ by name.
        weight: w, one number, or one for each name; 0 gives θ₀ and 1 gives θ₁ exactly.

    Raises:
        ValueError: other names or shapes.
    """
    _check(start, end)
    blended = {}
    for name, first in start.items():
        last = end[name]
        w = weight[name] if isinstance(weight, Mapping) else weight
        blended[name] = last if not last.is_floating_point() else _lerp(first, last, w)
    return blended


def add_scaled(
    weights: Weights, delta: Weights, scale: float | Tensor | Mapping[str, float | Tensor]
) -> dict[str, Tensor]:
    """Return θ + a δ by name, a one number or one for each name; other tensors stay.

    Raises:
        ValueError: δ has a name or shape that θ has not.
    """
    _check({name: weights[name] for name in delta if name in weights}, delta)
    added = dict(weights)
    for name, change in delta.items():
        a = scale[name] if isinstance(scale, Mapping) else scale
        if weights[name].is_floating_point():
            added[name] = weights[name] + a * change
    return added


def quadratic_anchor(weights: Weights, anchor: Weights, curvature: Weights) -> Tensor:
    """Return Σ_j F_j (θ_j − θ₀_j)²; value and gradient are zero at θ = θ₀.

    The pull of elastic weight consolidation (Kirkpatrick et al., PNAS 2017), without its ½.

    Args:
        weights: θ by name.
        anchor: θ₀; its names decide which tensors are pulled.
        curvature: F ≥ 0, like the anchor.
    """
    terms = [(curvature[n] * (weights[n] - first).square()).sum() for n, first in anchor.items()]
    return torch.stack(terms).sum()


def fisher_diagonal(
    loss: Callable[[Tensor], Tensor], weights: Weights, batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Return F_j = mean over batches of (∂ loss(batch) / ∂θ_j)².

    With a loss that is the mean over a batch this is the square of the mean gradient, as EATA
    defines it: it falls with the batch size.  Batches of one sample give the empirical Fisher
    information.

    Args:
        loss: ``batch -> scalar``, computed from `weights`.
        weights: tensors that require grad, by name.
        batches: at least one.

    Raises:
        ValueError: no batch.
    """
    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    count = 0
    for batch in batches:
        with torch.enable_grad():
            grads = torch.autograd.grad(loss(batch), list(weights.values()))
        for name, grad in zip(weights, grads, strict=True):
            total[name] += grad.square()
        count += 1
    if not count:
        raise ValueError("batches must hold at least one batch, but it is empty.")
    return {name: value / count for name, value in total.items()}


def _lerp(first: Tensor, last: Tensor, w: float | Tensor) -> Tensor:
    w = torch.as_tensor(w, dtype=first.dtype, device=first.device)
    return (1 - w) * first + w * last


def _check(start: Weights, end: Weights) -> None:
    shapes = [{name: tuple(value.shape) for name, value in sorted(w.items())} for w in (start, end)]
    for name in sorted(set(shapes[0]) ^ set(shapes[1])):
        raise ValueError(f"both ends must have the same tensors, but only one has {name!r}.")
    for name, shape in shapes[0].items():
        if shape != shapes[1][name]:
            raise ValueError(
                f"{name!r} must have one shape on both ends, but got {shape} and {shapes[1][name]}."
            )
