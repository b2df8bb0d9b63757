"""Running averages, roots and quotients that the adaptive update rules share."""

from __future__ import annotations

import torch
from torch import Tensor

from hypergrad.optimizers.flat import cast, scale
from hypergrad.optimizers.values import double_dtype

__all__ = ["add_quotient", "average_of_squares", "double", "plus", "root_bar", "safe_sqrt"]


def average_of_squares(average: Tensor, g: Tensor, beta: float | Tensor) -> Tensor:
    """Return β·average + (1 − β)g², rounded as `torch.optim` does."""
    decayed = scale(average, beta)
    if isinstance(beta, Tensor):
        return torch.addcmul(decayed, scale(g, 1 - beta), g)
    return torch.addcmul(decayed, g, g, value=1 - beta)


def add_quotient(x: Tensor, a: float | Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return x + a·y/z, rounded as `torch.optim` does with `addcdiv_`."""
    if isinstance(a, Tensor):
        return torch.addcdiv(x, scale(y, a), z)
    return torch.addcdiv(x, y, z, value=a)


def safe_sqrt(x: Tensor) -> Tensor:
    """Return √x with derivative 0 at x = 0, to every order."""
    if not x.requires_grad:
        return x.sqrt()
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def root_bar(bar: Tensor, root: Tensor, times: float | Tensor = 1.0) -> Tensor:
    """Pull the adjoint of √x/times back to x; 0 where x = 0."""
    return torch.where(root > 0, bar / (2 * root * cast(times, root)), 0.0)


def double(beta: float | Tensor) -> float | Tensor:
    """Return β for a power βᵗ that must not be rounded to the dtype of the params."""
    return beta.to(double_dtype(beta.device)) if isinstance(beta, Tensor) else beta


def plus(x: Tensor, y: Tensor | None) -> Tensor:
    """Return x + y, where None stands for zero."""
    return x if y is None else x + y
