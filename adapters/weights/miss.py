"""MiSS, formerly Bone, and its weight-dependent first form Bat: one trained tensor a layer.

    miss   W = W₀ + s Dᵀ E,  E = [I_r I_r … ] cut to i columns,   D ∈ R^{r×o}, D = 0
    mini   the same with D ∈ R^{r×m} repeated o/m times over the outputs
    bat    W = W₀ + s (W₀ₚ D_q + D_q) for each r×r block p of block row q,  D ∈ R^{(o/r)×r×r}, D = 0
    kaiming  miss with D uniform in ±1/√o at the start, which is not the identity

Column j of miss is row j mod r of D.  Trained: D and the last layer; frozen: W₀ and the biases.
θ has r o numbers a layer, or r m.  The rank of the increment is at most r for miss and mini.

Source: Kang and Yin, arXiv 2409.15371: v1 (Bone) is bat, later versions (MiSS) are miss.  The gain
s is ours, 1 in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adapters.finetune import DECAY, learning_rate
from adapters.reparam import Parts, Reparam, Start, adaptable, replaced
from adapters.weights.method import WeightAdapter
from bilevel.domains import Choice, Grad, Int
from bilevel.space import Space

__all__ = ["MiSS", "MiSSMethod"]


@dataclass(frozen=True)
class MiSS(Reparam):
    """W = W₀ + s Dᵀ [I_r I_r …], or one of its relatives.

    Attributes:
        rank: r; "bat" needs a divisor of outputs and inputs.
        variant: "miss", "mini", "bat" or "kaiming".
        mini_rows: m of "mini", a divisor of outputs.
        scale: s.
    """

    rank: int = 8
    variant: Literal["miss", "mini", "bat", "kaiming"] = "miss"
    mini_rows: int = 1
    scale: float | Tensor = 1.0

    def start(self, start: Start) -> Parts:
        r, (rows, columns) = start.check_rank(self.rank), start.weight.shape
        if self.variant == "bat":
            if rows % r or columns % r:
                raise ValueError(
                    f"{start.name}: rank of variant 'bat' must divide {rows} and {columns}, the "
                    f"shape of the weight, but got {r}."
                )
            return Parts({"D": start.zeros(rows // r, r, r)})
        if self.variant == "mini":
            if self.mini_rows < 1 or rows % self.mini_rows:
                raise ValueError(
                    f"{start.name}: mini_rows must divide {rows}, the number of outputs, but got "
                    f"{self.mini_rows}."
                )
            return Parts({"D": start.zeros(r, self.mini_rows)})
        if self.variant == "kaiming":
            return Parts({"D": start.uniform(r, rows, bound=1 / math.sqrt(rows))})
        if self.variant != "miss":
            raise ValueError(
                f"variant must be 'miss', 'mini', 'bat' or 'kaiming', but got {self.variant!r}."
            )
        return Parts({"D": start.zeros(r, rows)})

    def weight(self, w: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        d, (rows, columns) = parts["D"], w.shape
        if self.variant == "bat":
            r = d.shape[1]
            # blocks[q, p] is block p of block row q, r×r
            blocks = w.reshape(rows // r, r, columns // r, r).transpose(1, 2)
            change = blocks @ d[:, None] + d[:, None]
            return w + self.scale * change.transpose(1, 2).reshape(rows, columns)
        if self.variant == "mini":
            d = d.repeat(1, rows // d.shape[1])
        column = torch.arange(columns, device=w.device) % d.shape[0]
        return w + self.scale * d.T[:, column]


class MiSSMethod(WeightAdapter):
    """MiSS (Bone): one shared shard tensor in place of two factors (Kang and Yin, 2024)."""

    name = "miss"
    reparam = MiSS
    space = Space(
        lr=learning_rate(0.03),
        weight_decay=DECAY,
        scale=Grad(1.0, low=0.01, high=10.0, scale="log", doc="gain s; smooth"),
        rank=Int(1, 32, log=True, default=8, doc="rank or block size r"),
        variant=Choice(
            "miss", "bat", "mini", "kaiming", default="miss", doc="how D enters and starts"
        ),
        mini_rows=Int(
            1, 64, log=True, default=1, doc="m of variant mini", when={"variant": "mini"}
        ),
    ).own(lr="sampler")

    def choose(self, model: nn.Module) -> Mapping[str, Reparam]:
        """The map of each layer; bat and mini get the largest block that divides its weight."""
        settings, places = self.settings(), adaptable(model)
        assert isinstance(settings, MiSS)
        found: dict[str, Reparam] = {}
        for name in self.targets(model):
            rows, columns = places[name].weight.flatten(1).shape
            fitting: dict[str, int] = {}
            if settings.variant == "bat":
                fitting["rank"] = _divisor(math.gcd(rows, columns), settings.rank)
            if settings.variant == "mini":
                fitting["mini_rows"] = _divisor(rows, settings.mini_rows)
            found[name] = replaced(settings, fitting)
        return found


def _divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is not above `most`."""
    return max(d for d in range(1, min(most, number) + 1) if number % d == 0)
