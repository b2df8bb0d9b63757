"""Learned sample weights: data hyper-cleaning as a learner.

    loss = Σ_b w_b ℓ_b,   w = σ(θ_b)/Σ σ(θ_b) over the batch

θ, one number for each training sample, is smooth and owned by the gradient: an outer algorithm
learns it on the validation split, which must be trusted.  All weights of the network are trained,
nothing is frozen.  Without an outer algorithm all samples weigh the same.

Source: Franceschi et al., ICML 2017, section 5.1; see `bilevel.learned_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters.method import Batch
from adapters.objectives.perceptron import Perceptron
from bilevel.domains import Grad
from bilevel.learned_weights import LearnedWeights
from bilevel.space import Space

__all__ = ["LearnedSampleWeights"]


class LearnedSampleWeights(Perceptron):
    """A weight per training sample, learned on validation data (Franceschi et al., 2017)."""

    name = "learned_weights"
    space = Space(
        lr=Grad(0.05, low=1e-3, high=1.0, scale="log", doc="learning rate; smooth"),
        weight_decay=Grad(1e-4, low=1e-7, high=1e-1, scale="log", doc="L2 penalty; smooth"),
        logit=Grad(0.0, low=-8.0, high=8.0, doc="θ of each training sample; smooth"),
    ).own(lr="sampler", weight_decay="sampler")

    def shapes(self, model: nn.Module) -> Mapping[str, tuple[int, ...]]:
        """One θ for each training sample."""
        return {"logit": (self._rows(),)}

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Σ w_b ℓ_b."""
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        logits = torch.as_tensor(hparams["logit"]).to(losses).expand(self._rows())
        return (LearnedWeights(logits).weights(batch["index"]) * losses).sum()

    def _rows(self) -> int:
        return len(self.setting.task.split("train")["y"])
