"""LoRA: a low-rank increment.

    W = W₀ + s B A,   A ∈ R^{r×i}, B ∈ R^{o×r},   B = 0, A uniform in ±1/√i

Trained: A, B and the last layer; frozen: W₀ and the biases.  θ has r (o + i) numbers a layer, and
the rank of the increment is at most r.  s = alpha/r.

Source: Hu et al., LoRA: Low-rank adaptation of large language models, ICLR 2022, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adapters.finetune import DECAY, learning_rate
from adapters.reparam import Parts, Reparam, Start
from adapters.weights.method import WeightAdapter
from bilevel.domains import Grad, Int
from bilevel.space import Space

__all__ = ["LoRA", "LoRAMethod"]


@dataclass(frozen=True)
class LoRA(Reparam):
    """W = W₀ + s B A, with B = 0 at the start.

    Attributes:
        rank: r, at most min(outputs, inputs).
        scale: s.
    """

    rank: int = 4
    scale: float | Tensor = 1.0

    def start(self, start: Start) -> Parts:
        r = start.check_rank(self.rank)
        rows, columns = start.weight.shape
        # As kaiming_uniform_(a=√5), which the published code uses.
        a = start.uniform(r, columns, bound=1 / math.sqrt(columns))
        return Parts({"A": a, "B": start.zeros(rows, r)})

    def weight(self, w: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        return w + self.scale * (parts["B"] @ parts["A"])


class LoRAMethod(WeightAdapter):
    """LoRA: a low-rank increment of each hidden weight (Hu et al., ICLR 2022)."""

    name = "lora"
    reparam = LoRA
    space = Space(
        lr=learning_rate(0.01),
        weight_decay=DECAY,
        scale=Grad(1.0, low=0.01, high=64.0, scale="log", doc="factor s = alpha/r; smooth"),
        rank=Int(1, 32, log=True, default=4, doc="rank r of the increment"),
    ).own(lr="sampler")
