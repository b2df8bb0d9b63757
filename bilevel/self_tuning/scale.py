"""The scale σ of the perturbation: learned against an entropy, kept in bounds.

σ = softplus(s).  The outer objective E_ε L_V(w(λ + σ ⊙ ε)) - τ Σ_i log σ_i pulls σ_i down where
L_V is curved along hyperparameter i, and up by τ/σ_i everywhere (MacKay et al. 2019, eq. 13).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = ["clamped", "entropy", "inverse_softplus", "softplus"]


def softplus(s: Tensor) -> Tensor:
    """Return σ."""
    return F.softplus(s)


def inverse_softplus(sigma: Tensor) -> Tensor:
    """Return s with softplus(s) = σ > 0."""
    return sigma + torch.log(-torch.expm1(-sigma))


def entropy(sigma: Tensor) -> Tensor:
    """Return H[N(λ, diag σ²)] = Σ_i log(σ_i √(2πe))."""
    return sigma.log().sum() + 0.5 * len(sigma) * math.log(2 * math.pi * math.e)


def clamped(s: Tensor, low: float, high: float) -> tuple[Tensor, int]:
    """Return s with σ in [low, high], and how many elements were outside."""
    sigma = softplus(s)
    inside = sigma.clamp(low, high)
    count = int((inside != sigma).sum())
    return (torch.where(inside == sigma, s, inverse_softplus(inside)) if count else s), count
