"""Terms of training losses that several methods share; each is differentiable in its weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = [
    "entropy",
    "half_squares",
    "kl_to_anchor",
    "mixed",
    "smoothed_targets",
    "soft_cross_entropy",
]


def half_squares(weight: float | Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Return ½ λ Σ ‖θ‖², the penalty of weight decay λ; a tensor λ makes it differentiable in it.

    For SGD it is the same as a decoupled decay, and every hypergradient sees it.
    """
    half: Tensor = 0.5 * weight * torch.stack([t.square().sum() for t in tensors]).sum()
    return half


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return −Σ_k q_k log softmax(z)_k in nats of each sample, shape (batch,).

    Its gradient in the logits is softmax(z) − q.

    Args:
        logits: z, shape (batch, classes).
        targets: q, a distribution for each sample, of the same shape.

    Raises:
        ValueError: other shapes.
    """
    if logits.shape != targets.shape or logits.dim() != 2:
        raise ValueError(
            f"logits and targets must have one shape (batch, classes), but got "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}."
        )
    return F.cross_entropy(logits, targets, reduction="none")


def smoothed_targets(labels: Tensor, n_classes: int, smoothing: float | Tensor) -> Tensor:
    """Return (1 − ε) onehot(y) + ε/K, shape (batch, K) (Szegedy et al., CVPR 2016, section 7).

    Args:
        labels: y, shape (batch,).
        n_classes: K.
        smoothing: ε in [0, 1]; a tensor makes the result differentiable in it.
    """
    hot = F.one_hot(labels, n_classes)
    hot = hot.to(smoothing if isinstance(smoothing, Tensor) else torch.get_default_dtype())
    return (1 - smoothing) * hot + smoothing / n_classes


def mixed(*tensors: Tensor, concentration: float) -> tuple[Tensor, ...]:
    """Return λ a + (1 − λ) a[π] of each tensor, with one λ ~ Beta(c, c) and one permutation π.

    Mixup (Zhang et al., ICLR 2018) on inputs and targets alike.  Draws from torch's default
    generator; concentration 0 returns the tensors as they are.

    Args:
        *tensors: one row per sample.
        concentration: c ≥ 0.
    """
    if concentration == 0:
        return tensors
    share = float(torch.distributions.Beta(concentration, concentration).sample())
    order = torch.randperm(len(tensors[0])).to(tensors[0].device)
    return tuple(torch.lerp(a[order], a, share) for a in tensors)


def kl_to_anchor(logits: Tensor, anchor: Tensor) -> Tensor:
    """Return KL(softmax(a) ‖ softmax(z)) in nats of each sample, shape (batch,).

    Value and gradient are zero where the logits equal the anchor's.

    Args:
        logits: z, shape (batch, classes).
        anchor: a, of the same shape, from a frozen copy of the network.
    """
    target = anchor.log_softmax(dim=1)
    return (target.exp() * (target - logits.log_softmax(dim=1))).sum(dim=1)


def entropy(logits: Tensor) -> Tensor:
    """Return −Σ_k p_k log p_k of p = softmax(z) in nats of each sample, shape (batch,)."""
    log_p = logits.log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)
