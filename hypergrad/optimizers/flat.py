"""One flat vector for all trained tensors, and arithmetic whose coefficients may be tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hypergrad.tree import Leaves

__all__ = ["axpy", "cast", "flatten", "flatten_params", "scale", "unflatten", "widen"]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors to one vector."""
    return torch.cat([t if t.dim() == 1 else t.reshape(-1) for t in tensors])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a flat vector in the shapes of `like`."""
    pieces = flat.split_with_sizes([t.numel() for t in like])
    return [p if t.dim() == 1 else p.view(t.shape) for p, t in zip(pieces, like, strict=True)]


def flatten_params(params: Leaves) -> Tensor:
    """Concatenate the trained tensors.

    Raises:
        ValueError: they differ in dtype or device.
    """
    first = params.tensors[0]
    for tensor, name in zip(params.tensors, params.names, strict=True):
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                "params: trained tensors must share one dtype and one device, but "
                f"{params.names[0]} is {first.dtype} on {first.device} and {name} is "
                f"{tensor.dtype} on {tensor.device}."
            )
    return flatten(params.tensors).detach()


def widen(tensor: Tensor) -> Tensor:
    """Return at least float32: bars and tangents are accumulated in this."""
    return tensor if tensor.dtype in _WIDE else tensor.float()


_WIDE = (torch.float32, torch.float64)


def cast(coefficient: float | Tensor, like: Tensor) -> float | Tensor:
    """Give a vector coefficient the dtype of `like`; numbers pass."""
    if isinstance(coefficient, Tensor) and coefficient.dim():
        return coefficient.to(like.dtype)
    return coefficient


def scale(x: Tensor, a: float | Tensor) -> Tensor:
    """Return a·x."""
    return torch.mul(x, cast(a, x))


def axpy(x: Tensor, a: float | Tensor, y: Tensor) -> Tensor:
    """Return x + a·y, rounded once as `torch.optim` does with `add_(alpha=)` and `addcmul_`."""
    if isinstance(a, Tensor):
        return torch.addcmul(x, y, a.to(x.dtype))
    return torch.add(x, y, alpha=a)
