"""HUT: a low-rank factor that multiplies the weight elementwise.

    residual   W = W₀ ⊙ (1 + s M_A M_B),        M_A = 0, M_B ~ N(0, σ²)
    direct     W = W₀ ⊙ (1 + s (M_A M_B − 1)),  first column of M_A and first row of M_B one, the
               other columns of M_A zero, the other rows of M_B ~ N(0, σ²)

Trained: M_A ∈ R^{o×r}, M_B ∈ R^{r×i} and the last layer; frozen: W₀ and the biases.  θ has
r (o + i) numbers a layer.  A weight of zero stays zero, so a pruned network keeps its mask.

The paper's constant term is not public; both forms are readings of it, derived, not quoted.
Both factors are stored as offsets from their starts: the loss is differentiable in σ, and weight
decay of M_A pulls towards W₀ in both forms (on the ones of the direct form it would pull W to 0).

Source: Zhang, Zhou and Chen, HUT, arXiv 2409.13501; the residual form is that of HiRA (ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from adapters.finetune import DECAY, learning_rate
from adapters.reparam import Parts, Reparam, Start
from adapters.weights.method import WeightAdapter
from bilevel.domains import Choice, Grad, Int
from bilevel.space import Space

__all__ = ["HUT", "HUTMethod"]


@dataclass(frozen=True)
class HUT(Reparam):
    """W = W₀ ⊙ (1 + s M_A M_B), or its direct form.

    Attributes:
        rank: r.
        form: "residual" or "direct".
        scale: s.
        std: σ of M_B at the start; None for 1/√r.
    """

    rank: int = 4
    form: Literal["residual", "direct"] = "residual"
    scale: float | Tensor = 1.0
    std: float | Tensor | None = None

    def start(self, start: Start) -> Parts:
        if self.form not in ("residual", "direct"):
            raise ValueError(f"form must be 'residual' or 'direct', but got {self.form!r}.")
        r, (rows, columns) = start.check_rank(self.rank), start.weight.shape
        noise = start.normal(r, columns)
        if self.form == "direct":
            noise[0] = 0.0
        return Parts({"A": start.zeros(rows, r), "B": start.zeros(r, columns)}, {"noise": noise})

    def weight(self, w: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        std = parts["A"].shape[1] ** -0.5 if self.std is None else self.std
        a, b = parts["A"], parts["B"] + std * parts["noise"]
        factor = a @ b
        if self.form == "direct":  # (M_A M_B − 1) with a column and a row of ones
            factor = factor + a[:, :1] + b[:1]
        return w + self.scale * w * factor


class HUTMethod(WeightAdapter):
    """HUT: an elementwise low-rank factor of each hidden weight (Zhang et al., 2024)."""

    name = "hut"
    reparam = HUT
    space = Space(
        lr=learning_rate(0.01),
        weight_decay=DECAY,
        scale=Grad(1.0, low=0.01, high=30.0, scale="log", doc="factor s; smooth"),
        std=Grad(0.5, low=0.01, high=3.0, scale="log", doc="start σ of M_B; smooth"),
        form=Choice("residual", "direct", default="residual", doc="where the constant stands"),
        rank=Int(1, 32, log=True, default=4, doc="rank r of the factor"),
    ).own(lr="sampler")
