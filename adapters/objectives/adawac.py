"""AdaWAC: a learned weight per sample between the labels and the agreement of two views.

    loss = mean_b [β'_b ℓ_CE,b + (1 − β'_b) λ ρ(z₁, z₂)_b],   logit β' = logit β + η (ℓ_CE − λ ρ)

ℓ_CE is the mean cross entropy of two noisy views, ρ one minus the cosine of their hidden features.
Weights start at ½ and are kept by sample index.  All weights of the network are trained, nothing is
frozen.  β' has no gradient in training and its full derivative in a hypergradient, where the
weights at the start of the window are constant; the published objective is a min-max on one data
set, and β itself is never tuned by a hypergradient.

Source: Dong, Xie and Ward, ICML 2023, arXiv 2210.01891, algorithm 1; see `bilevel.adawac`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters.losses import half_squares
from adapters.method import Batch, Method, keep
from adapters.networks import MLP
from adapters.tasks import Classification
from bilevel.adawac import mixed
from bilevel.domains import Float, Grad, Int
from bilevel.space import Space

__all__ = ["AdaWAC"]


class AdaWAC(Method):
    """AdaWAC: a saddle weight per sample between labels and consistency (Dong et al., 2023)."""

    name = "adawac"
    space = Space(
        lr=Grad(0.05, low=1e-3, high=1.0, scale="log", doc="learning rate; smooth"),
        weight_decay=Grad(1e-4, low=1e-7, high=1e-1, scale="log", doc="L2 penalty; smooth"),
        consistency=Grad(1.0, low=0.1, high=10.0, scale="log", doc="scale λ of ρ; smooth"),
        weight_step=Grad(1.0, low=0.01, high=10.0, scale="log", doc="mirror step η; smooth"),
        noise=Grad(0.1, low=1e-3, high=0.5, scale="log", doc="of the two views; smooth"),
        init=Float(0.1, 0.9, default=0.5, doc="β before the first visit"),
        clamp=Float(4.0, 12.0, default=6.0, doc="largest |logit β|"),
        burn_in=Int(0, 1000, default=20, doc="steps in which β does not move"),
    ).own(lr="sampler", weight_step="sampler")

    def network(self) -> nn.Module:
        """A perceptron with two hidden layers of 64 units, tanh."""
        task = cast(Classification, self.setting.task)
        return MLP(task.input_shape, task.n_classes, activation="tanh")

    def attach(self, model: nn.Module) -> None:
        """Start every weight at init."""
        task, init = self.setting.task, self.setting.constants["init"]
        logit = torch.logit(torch.tensor(init, dtype=torch.float64))
        rows = len(task.split("train")["y"])
        self.memory["logits"] = torch.full((rows,), float(logit), dtype=task.dtype).to(task.device)

    def detached(
        self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch
    ) -> dict[str, Tensor]:
        """The updated logits of the batch."""
        supervised, consistency = self._losses(model, hparams, batch)
        logits = self.memory["logits"][batch["index"]]
        if batch["step"] >= hparams["burn_in"]:
            logits = logits + hparams["weight_step"] * (supervised - consistency)
        return {"logits": logits.clamp(-hparams["clamp"], hparams["clamp"])}

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """mean [β' ℓ_CE + (1 − β') λ ρ]."""
        keep(batch, logits=batch["logits"])
        return mixed(batch["logits"].sigmoid(), *self._losses(model, hparams, batch))

    def after_batch(self, batch: Batch) -> Mapping[str, float]:
        """Store the updated logits."""
        self.memory["logits"][batch["index"]] = batch["kept"]["logits"]
        return {}

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        """½ λ ‖w‖²."""
        return half_squares(hparams["weight_decay"], model.parameters())

    def _losses(
        self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return ℓ_CE and λ ρ of each sample; the views are those of the batch's seed."""
        x, generator = batch["x"], torch.Generator().manual_seed(int(batch["seed"]) % 2**63)
        losses, features = [], []
        for _ in range(2):
            drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            seen: list[Tensor] = []
            logits = model(x + hparams["noise"] * drawn, lambda i, h, s=seen: s.append(h) or h)
            losses.append(F.cross_entropy(logits, batch["y"], reduction="none"))
            features.append(seen[-1])
        consistency = 1 - F.cosine_similarity(features[0], features[1], dim=1)
        return (losses[0] + losses[1]) / 2, hparams["consistency"] * consistency
