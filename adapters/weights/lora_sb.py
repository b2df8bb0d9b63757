"""LoRA-SB: an r×r core between frozen bases that approximate the first full fine-tuning step.

    W = W₀ + B (η₀ S̃ + s R) A,   R ∈ R^{r×r} trained, R = 0
    update   −sign(∂L/∂W₀) ≈ B S̃ A, its top-r SVD;  B, A orthonormal
    weight   LoRA-XS, the baseline: W₀ ≈ B A with B = U_r Σ_r, A = V_rᵀ, and S̃ ~ N(0, 1)

Trained: R and the last layer; frozen: W₀, B, A, S̃ and the biases.  θ has r² numbers a layer.  With
"update", the function at the start is W₀ moved by η₀ on purpose.  The core's start η₀ S̃ is kept
apart from R, so that the loss is differentiable in η₀; the start does not depend on s, as it does
in published code where alpha is not r.  "raw" takes the gradient itself instead of its sign, scaled
to the same norm √(o i).

Source: Ponkshe et al., LoRA-SB, arXiv 2411.19557, sections 3 and 4; Balazy et al., LoRA-XS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters.finetune import DECAY, learning_rate
from adapters.reparam import Parts, Reparam, Start
from adapters.reparam.base import Need, signed_svd
from adapters.weights.method import WeightAdapter
from bilevel.domains import Choice, Grad, Int
from bilevel.space import Space

__all__ = ["LoRASB", "LoRASBMethod"]


@dataclass(frozen=True)
class LoRASB(Reparam):
    """W = W₀ + B (η₀ S̃ + s R) A.

    Attributes:
        rank: r.
        basis: "update" (LoRA-SB) or "weight" (LoRA-XS).
        transform: of the gradient, "sign" or "raw".
        first_step: η₀.
        scale: s.
    """

    rank: int = 16
    basis: Literal["update", "weight"] = "update"
    transform: Literal["sign", "raw"] = "sign"
    first_step: float | Tensor = 1e-3
    scale: float | Tensor = 1.0

    @property
    def needs(self) -> frozenset[Need]:
        """The gradient of the weight, for basis "update"."""
        return frozenset({"gradient"} if self.basis == "update" else ())

    def start(self, start: Start) -> Parts:
        r = start.check_rank(self.rank)
        if self.basis == "weight":
            u, sigma, vt = start.svd()
            b, core = u[:, :r] * sigma[:r], start.normal(r, r)
        elif self.basis == "update":
            u, sigma, vt = signed_svd(-self._step(start))
            b, core = u[:, :r], sigma[:r].diag()
        else:
            raise ValueError(f"basis must be 'update' or 'weight', but got {self.basis!r}.")
        return Parts({"R": start.zeros(r, r)}, {"A": vt[:r], "B": b, "core": core})

    def _step(self, start: Start) -> Tensor:
        assert start.gradient is not None
        if self.transform == "sign":
            return start.gradient.sign()
        if self.transform != "raw":
            raise ValueError(f"transform must be 'sign' or 'raw', but got {self.transform!r}.")
        gradient: Tensor = start.gradient / start.gradient.norm()
        return gradient * math.sqrt(gradient.numel())

    def weight(self, w: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        core = self.first_step * parts["core"] + self.scale * parts["R"]
        return w + parts["B"] @ core @ parts["A"]


class LoRASBMethod(WeightAdapter):
    """LoRA-SB: an r×r core in the frame of the first update (Ponkshe et al., 2024)."""

    name = "lora_sb"
    reparam = LoRASB
    space = Space(
        lr=learning_rate(0.01),
        weight_decay=DECAY,
        first_step=Grad(1e-3, low=1e-6, high=0.1, scale="log", doc="start η₀; smooth"),
        scale=Grad(1.0, low=0.1, high=10.0, scale="log", doc="factor s; smooth"),
        basis=Choice("update", "weight", default="update", doc="LoRA-SB, or LoRA-XS"),
        samples=Int(
            1,
            1000,
            log=True,
            default=50,
            doc="training samples of the first gradient",
            when={"basis": "update"},
        ),
        transform=Choice(
            "sign", "raw", default="sign", doc="of the first gradient", when={"basis": "update"}
        ),
        rank=Int(2, 32, log=True, default=16, doc="size r of the core"),
    ).own(lr="sampler")

    def calibrate(self, model: nn.Module) -> Tensor:
        """Return the loss on some training samples, chosen by the run's seed."""
        data = self.setting.task.split("train")
        rows = torch.randperm(len(data["y"]))[: self.setting.constants["samples"]]
        rows = rows.to(data["y"].device)
        return F.cross_entropy(model(data["x"][rows]), data["y"][rows])
