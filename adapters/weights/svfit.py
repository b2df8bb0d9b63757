"""SVFit: only the top singular values of a weight are trained.

    W = W₀ + U_r diag(σ − σ⁰) V_rᵀ,   U_r, σ⁰, V_r = top-r SVD of W₀
    linear  σ = σ⁰ + (σ⁰)^p δ,    log  σ = σ⁰ exp(δ),    δ = 0 at the start
    loss + λ Σ (σ − σ⁰)²

Trained: δ ∈ R^r a layer and the last layer; frozen: W₀ and the biases.  U_r and V_r are stored with
signs fixed, as a repeated σ leaves them free.  σ may become negative.  Weight decay acts on δ, that
is towards the pretrained values.  p and λ are ours (0 in the paper): p = 1 makes learning rates
relative to σ⁰.

Source: Sun et al., SVFit, arXiv 2409.05926.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adapters.finetune import DECAY, learning_rate
from adapters.reparam import Parts, Reparam, Start, adaptable, replaced
from adapters.weights.method import WeightAdapter
from bilevel.domains import Choice, Float, Grad
from bilevel.space import Space

__all__ = ["SVFit", "SVFitMethod"]


@dataclass(frozen=True)
class SVFit(Reparam):
    """W = W₀ + U_r diag(σ − σ⁰) V_rᵀ.

    Attributes:
        rank: r; None for min(outputs, inputs).
        form: "linear" or "log".
        exponent: p of form "linear".
        anchor: λ, the pull towards σ⁰.
    """

    rank: int | None = None
    form: Literal["linear", "log"] = "linear"
    exponent: float | Tensor = 0.0
    anchor: float | Tensor = 0.0

    def start(self, start: Start) -> Parts:
        if self.form not in ("linear", "log"):
            raise ValueError(f"form must be 'linear' or 'log', but got {self.form!r}.")
        r = min(start.weight.shape) if self.rank is None else start.check_rank(self.rank)
        u, sigma, vt = start.svd()
        return Parts({"delta": start.zeros(r)}, {"U": u[:, :r], "S0": sigma[:r], "V": vt[:r]})

    def change(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return σ − σ⁰."""
        before, delta = parts["S0"], parts["delta"]
        if self.form == "log":
            return before * torch.expm1(delta)
        return before.clamp(min=torch.finfo(before.dtype).tiny) ** self.exponent * delta

    def weight(self, w: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return w + (parts["U"] * self.change(parts)) @ parts["V"]

    def penalty(self, parts: Mapping[str, Tensor]) -> Tensor:
        """λ Σ (σ − σ⁰)²."""
        return self.anchor * self.change(parts).square().sum()


class SVFitMethod(WeightAdapter):
    """SVFit: only the top singular values of each hidden weight are trained (Sun et al., 2024)."""

    name = "svfit"
    reparam = SVFit
    space = Space(
        lr=learning_rate(0.03),
        weight_decay=DECAY,
        anchor=Grad(1e-5, low=1e-7, high=10.0, scale="log", doc="pull λ towards σ⁰; smooth"),
        exponent=Grad(0.0, low=-1.0, high=1.5, doc="step of value j grows like σ_j^p; smooth"),
        form=Choice("linear", "log", default="linear", doc="how δ changes σ"),
        share=Float(0.05, 1.0, default=1.0, doc="share of the singular values that is trained"),
    ).own(lr="sampler")

    def choose(self, model: nn.Module) -> Mapping[str, Reparam]:
        """The map of each layer, with its rank."""
        share, places = self.setting.constants["share"], adaptable(model)
        ranks = {n: min(places[n].weight.flatten(1).shape) for n in self.targets(model)}
        return {
            name: replaced(self.settings(), {"rank": max(1, round(share * r))})
            for name, r in ranks.items()
        }
