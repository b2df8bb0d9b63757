"""Loss-based reweighting: samples weigh by their losses in the batch.

    loss = Σ_i w_i ℓ_i,   w = softmax(s(h)/r),   h the losses of the batch scaled to [−1, 1]

All weights are trained, nothing is frozen.  The losses in w have no gradient in training and their
full derivative in a hypergradient; r is smooth.

Source: Sow et al., ICLR 2025, arXiv 2502.06733; see `bilevel.reweighting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters.method import Batch
from adapters.objectives.perceptron import Perceptron
from bilevel.domains import Choice, Grad, Int
from bilevel.reweighting import Reweighter
from bilevel.space import Space

__all__ = ["Reweighted"]


class Reweighted(Perceptron):
    """Loss-based sample weights: redundant, middling or hard samples first (Sow et al., 2025)."""

    name = "reweighted"
    space = Space(
        lr=Grad(0.05, low=1e-3, high=1.0, scale="log", doc="learning rate; smooth"),
        weight_decay=Grad(1e-4, low=1e-7, high=1e-1, scale="log", doc="L2 penalty; smooth"),
        temperature=Grad(1.0, low=0.1, high=100.0, scale="log", doc="r; large is uniform; smooth"),
        strategy=Choice(
            "linupper",
            "upper",
            "quadratic",
            "extremes",
            "uniform",
            default="linupper",
            doc="which losses weigh more",
        ),
        norm=Choice("minmax", "rank", default="minmax", doc="how losses are scaled"),
        burn_in=Int(0, 100_000, default=20, doc="steps with uniform weights"),
    ).own(lr="sampler", temperature="sampler")

    def detached(
        self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch
    ) -> dict[str, Tensor]:
        """The losses that the weights are made of."""
        return {"losses": self._losses(model, batch)}

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Σ w_i ℓ_i; the plain mean in the first steps."""
        losses = self._losses(model, batch)
        if batch["step"] < hparams["burn_in"]:
            return losses.mean()
        rule = Reweighter(hparams["strategy"], norm=hparams["norm"])
        return (rule.weights(batch["losses"], hparams["temperature"]) * losses).sum()

    def _losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
