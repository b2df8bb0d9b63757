"""Proximal steps and projections in closed form, differentiable in their point and settings.

For inner problems with a non-smooth term (see `ProximalGradient`) and for outer steps on
constrained hyperparameters: ``h = project_simplex(h - lr * grad)`` is projected gradient descent.
Derivatives are those of the piece that the point lies on; the kinks have measure zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad.traced import is_traced

__all__ = ["group_soft_threshold", "project_box", "project_simplex", "soft_threshold"]


def soft_threshold(x: Tensor, threshold: Tensor | float) -> Tensor:
    """Return argmin_u ‖u − x‖²/2 + t ‖u‖₁ = sign(x) max(|x| − t, 0), t ≥ 0 broadcast over x.

    Raises:
        ValueError: a threshold is negative.
    """
    t = _like(threshold, x)
    _check(t >= 0, "threshold must not be negative", t)
    return x - torch.clamp(x, -t, t)


def group_soft_threshold(x: Tensor, threshold: Tensor | float, dim: int = -1) -> Tensor:
    """Return argmin_u ‖u − x‖²/2 + t Σ ‖u_group‖₂ = x max(1 − t / ‖x_group‖₂, 0).

    Args:
        x: any shape.
        threshold: t ≥ 0, a number or one for each group (`dim` kept with size 1).
        dim: runs within a group.

    Raises:
        ValueError: a threshold is negative.
    """
    t = _like(threshold, x)
    _check(t >= 0, "threshold must not be negative", t)
    size = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    return x * torch.relu(1 - t / size.clamp(min=tiny))


def project_box(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Return the nearest point with low ≤ u ≤ high, entry by entry; bounds may be infinite.

    Raises:
        ValueError: a lower bound is above the upper one.
    """
    lower, upper = _like(low, x), _like(high, x)
    _check(lower <= upper, "high - low must not be negative", upper - lower)
    return torch.clamp(x, lower, upper)


def project_simplex(x: Tensor, total: Tensor | float = 1.0, dim: int = -1) -> Tensor:
    """Return the nearest point with u ≥ 0 and Σ u = total along `dim`.

    u = max(x − τ, 0) with τ from the sorted entries (Held, Wolfe and Crowder 1974; Duchi et al.
    2008, figure 1).

    Raises:
        ValueError: the total is not positive.
    """
    total = _like(total, x)
    _check(total > 0, "total must be positive", total)
    ordered = x.sort(dim=dim, descending=True).values.movedim(dim, -1)
    count = torch.arange(1, ordered.shape[-1] + 1, device=x.device)
    shifts = (ordered.cumsum(-1) - (total if total.dim() == 0 else total.movedim(dim, -1))) / count
    positive = (ordered > shifts).sum(-1, keepdim=True)
    shift = shifts.gather(-1, positive - 1).movedim(-1, dim)
    return torch.relu(x - shift)


def _like(value: Tensor | float, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def _check(holds: Tensor, message: str, value: Tensor) -> None:
    if not is_traced() and not bool(holds.all()):
        worst = value.detach()[~holds].reshape(-1)[0]
        raise ValueError(f"{message}, but got {float(worst):g}.")
