"""SORSA: the top singular triplets of a weight, trained apart and kept near orthonormal.

    W = W₀ + s (U diag(S) Vᵀ − U⁰ diag(S⁰) V⁰ᵀ),   U⁰, S⁰, V⁰ = top-r SVD of W₀ at the start
    R = 1/(2M) Σ_layers (‖UᵀU − I‖ + ‖VᵀV − I‖),   loss + γ R

Trained: U, S, V and the last layer; frozen: W₀ (the residual W₀ − s U⁰S⁰V⁰ᵀ is not stored) and the
biases.  θ has r (o + i) + r numbers a layer; the rank of the increment is at most 2r.

‖·‖ is the Frobenius norm, squared by default: at an exactly orthonormal point the gradient of the
published one, unsquared, is a unit vector of rounding noise.  κ is ours: the learning rate of S
relative to that of U and V, as S = S⁰ + κ δ with δ trained.  Weight decay acts on δ, but not on U
and V, whose length is the regularizer's.

Source: Cao, SORSA, arXiv 2409.00055, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adapters.finetune import DECAY, learning_rate
from adapters.reparam import Parts, Reparam, Start, maps
from adapters.weights.method import WeightAdapter
from bilevel.domains import Choice, Grad, Int
from bilevel.space import Space

__all__ = ["SORSA", "SORSAMethod", "orthogonality"]


@dataclass(frozen=True)
class SORSA(Reparam):
    """W = W₀ + s (U diag(S) Vᵀ − U⁰ diag(S⁰) V⁰ᵀ).

    Attributes:
        rank: r.
        scale: s.
        orthonormal: γ, the weight of the regularizer.
        norm: of the regularizer, "squared" or "plain".
        sigma_rate: κ, the learning rate of S relative to that of U and V.
    """

    rank: int = 4
    scale: float | Tensor = 1.0
    orthonormal: float | Tensor = 1e-2
    norm: Literal["squared", "plain"] = "squared"
    sigma_rate: float | Tensor = 1.0

    def start(self, start: Start) -> Parts:
        if self.norm not in ("squared", "plain"):
            raise ValueError(f"norm must be 'squared' or 'plain', but got {self.norm!r}.")
        r = start.check_rank(self.rank)
        u, sigma, vt = (t.contiguous() for t in start.svd())
        u, sigma, vt = u[:, :r], sigma[:r], vt[:r]
        return Parts(
            {"U": u, "delta": torch.zeros_like(sigma), "V": vt},
            {"S0": sigma, "top": (u * sigma) @ vt},
        )

    def weight(self, w: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        sigma = parts["S0"] + self.sigma_rate * parts["delta"]
        return w + self.scale * ((parts["U"] * sigma) @ parts["V"] - parts["top"])

    def penalty(self, parts: Mapping[str, Tensor]) -> Tensor:
        """γ/2 (‖UᵀU − I‖ + ‖VᵀV − I‖), to be averaged over the layers."""
        both = orthogonality(parts["U"].T, self.norm) + orthogonality(parts["V"], self.norm)
        return 0.5 * self.orthonormal * both


def orthogonality(rows: Tensor, norm: str = "squared") -> Tensor:
    """Return ‖A Aᵀ − I‖_F² of a matrix A, or with norm "plain" √(‖·‖_F² + tiny)."""
    gram = rows @ rows.T
    squared = (gram - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).square().sum()
    return squared if norm == "squared" else (squared + torch.finfo(rows.dtype).tiny).sqrt()


class SORSAMethod(WeightAdapter):
    """SORSA: trained top singular triplets, kept near orthonormal (Cao, 2024)."""

    name = "sorsa"
    reparam = SORSA
    space = Space(
        lr=learning_rate(3e-3),
        weight_decay=DECAY,
        scale=Grad(1.0, low=0.1, high=10.0, scale="log", doc="factor s; smooth"),
        orthonormal=Grad(
            1e-2, low=1e-6, high=1.0, scale="log", doc="weight γ of the regularizer; smooth"
        ),
        sigma_rate=Grad(
            1.0, low=0.1, high=10.0, scale="log", doc="learning rate κ of S to that of U, V; smooth"
        ),
        norm=Choice("squared", "plain", default="squared", doc="Frobenius norm of the regularizer"),
        rank=Int(1, 32, log=True, default=4, doc="singular triplets r that are trained"),
    ).own(lr="sampler")

    def undecayed(self, model: nn.Module) -> Collection[str]:
        """The singular vectors."""
        own = {id(m.parts[part]) for m in maps(model).values() for part in ("U", "V")}
        return [name for name, p in model.named_parameters() if id(p) in own]

    def regularizer(self, each: Sequence[Tensor | None]) -> Tensor | None:
        """γ R, the mean over the layers."""
        total = super().regularizer(each)
        return None if total is None else total / len(each)
