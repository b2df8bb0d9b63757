"""Training losses and augmentations with one strength for each example.

Every strength is a number or a tensor of shape (rows,); none needs a derivative in it.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bilevel.self_tuning.layers import Response

__all__ = [
    "activation_penalty",
    "cutout",
    "mixup",
    "noisy",
    "smoothed_cross_entropy",
    "squared_norm",
    "temporal_penalty",
]

Strength = float | Tensor


def squared_norm(module: nn.Module, *, biases: bool = False) -> Tensor:
    """Return ‖w‖² over all weights of two or more dimensions, or all parameters.

    Where layers respond, ‖w(s_b)‖² for each example b, exactly and without materializing a
    weight: row i contributes ‖p_i‖² + 2 g_bi ⟨p_i, R_i⟩ + g_bi² ‖R_i‖², g = G s.  A tied weight
    counts once, as the mean over its uses, each of which responds by itself.

    Returns:
        Shape (), or (rows,) where examples are perturbed one by one.
    """
    total: Tensor | None = None
    uses = Counter(id(w) for layer in module.modules() for w in layer._parameters.values())
    for layer in module.modules():
        for name, weight in layer._parameters.items():
            if weight is None or name.startswith(("response_", "gate_")):
                continue
            if weight.dim() < 2 and not biases:
                continue
            part = weight.square().sum()
            factor = layer.factor(name) if isinstance(layer, Response) else None
            if factor is not None and isinstance(layer, Response):
                response = layer.pair(name)[1]
                assert response is not None
                dims = [i for i in range(weight.dim()) if i != layer.gated_dim]
                cross, own = weight * response, response.square()
                if dims:
                    cross, own = cross.sum(dims), own.sum(dims)
                part = part + 2 * factor @ cross + factor.square() @ own
            part = part / uses[id(weight)]
            total = part if total is None else total + part
    if total is None:
        raise ValueError(f"squared_norm: {type(module).__name__} has no weights.")
    return total


def smoothed_cross_entropy(logits: Tensor, target: Tensor, smoothing: Strength) -> Tensor:
    """Return (1 - ε) (-log p_y) + ε mean_k (-log p_k) of each example, shape (rows,).

    Args:
        logits: shape (rows, classes).
        target: classes (rows,), or class shares (rows, classes).
        smoothing: ε.
    """
    costs = -logits.log_softmax(dim=1)
    hit = (costs * target).sum(1) if target.dim() == 2 else costs.gather(1, target[:, None])[:, 0]
    return (1 - smoothing) * hit + smoothing * costs.mean(1)


def noisy(x: Tensor, deviation: Strength) -> Tensor:
    """Return x + deviation · ε, ε standard normal."""
    return x + _column(deviation, x) * torch.randn_like(x)


def cutout(x: Tensor, length: Strength, holes: Strength = 1, most_holes: int = 4) -> Tensor:
    """Set square holes of each image to zero (DeVries and Taylor 2017).

    Args:
        x: images, shape (rows, channels, height, width).
        length: side of a hole in pixels; the part outside of the image is cut off.
        holes: their number, at most `most_holes`.
        most_holes: draws made for each image.
    """
    rows, _, height, width = x.shape
    center = torch.rand(2, rows, most_holes, device=x.device)
    side = torch.as_tensor(length, dtype=x.dtype, device=x.device).detach().expand(rows)
    count = torch.as_tensor(holes, dtype=x.dtype, device=x.device).detach().expand(rows)
    used = torch.arange(most_holes, device=x.device) < count[:, None]

    def inside(size: int, where: Tensor) -> Tensor:
        pixel = torch.arange(size, device=x.device) + 0.5
        return (pixel - (where * size)[..., None]).abs() < side[:, None, None] / 2

    hole = inside(height, center[0])[..., :, None] & inside(width, center[1])[..., None, :]
    hidden = (hole & used[..., None, None]).any(1)
    return x.masked_fill(hidden[:, None], 0.0)


def mixup(x: Tensor, target: Tensor, classes: int, alpha: Strength) -> tuple[Tensor, Tensor]:
    """Return convex combinations of pairs of examples and of their labels (Zhang et al. 2018).

    Args:
        x: inputs, shape (rows, ...).
        target: classes, shape (rows,).
        classes: their number.
        alpha: the weight of each example is max(λ, 1 - λ), λ ~ Beta(α, α), α at least 0.01.
    """
    rows = len(x)
    # Gamma variates of a small shape underflow, sooner in single precision.
    strength = torch.as_tensor(alpha, dtype=torch.float64, device=x.device).detach().expand(rows)
    strength = strength.clamp(min=0.01)
    weight = torch.distributions.Beta(strength, strength, validate_args=False).sample()
    weight = torch.maximum(weight, 1 - weight).to(x.dtype)
    other = torch.randperm(rows, device=x.device)
    shares = F.one_hot(target, classes).to(x.dtype)
    mixed = torch.lerp(x[other], x, _column(weight, x))
    return mixed, torch.lerp(shares[other], shares, weight[:, None])


def activation_penalty(outputs: Tensor) -> Tensor:
    """Return the mean square of each example's outputs, shape (rows,): AR (Merity et al. 2017)."""
    return outputs.square().flatten(1).mean(1)


def temporal_penalty(outputs: Tensor) -> Tensor:
    """Return the mean square of changes in time, shape (rows,): TAR; (rows, time, features)."""
    return outputs.diff(dim=1).square().flatten(1).mean(1)


def _column(strength: Strength, x: Tensor) -> Strength:
    if isinstance(strength, Tensor) and strength.dim() == 1:
        return strength.view(-1, *[1] * (x.dim() - 1))
    return strength
