"""A weight per training sample, learned by hypergradient: data hyper-cleaning.

    w_i = σ(θ_i)/Σ_j σ(θ_j) over the batch,   min_θ F(argmin_w Σ_i w_i ℓ_i)

θ is a hyperparameter of an outer level, F a validation loss on trusted samples.  The published
form is Σ σ(θ_i) ℓ_i without the division; the division (ours) makes the scale that of a mean, so
that the step does not shrink as samples are switched off, and leaves a common shift of large
negative θ without effect.

Source: Franceschi et al., Forward and reverse gradient-based hyperparameter optimization, ICML
2017, section 5.1 (data hyper-cleaning).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel.weighing import Reweighting, Rule, gathered, scattered

__all__ = ["LearnedWeights"]


@dataclass(frozen=True)
class LearnedWeights(Rule):
    """Weights of samples by their index, in the place of a `bilevel.reweighting.Reweighter`.

        inner = lambda params, h, batch: LearnedWeights(h["theta"])(
            losses(params, batch), index=batch["index"])[0]

    Attributes:
        logits: θ of every training sample, shape (samples,).

    Raises:
        ValueError: another shape.
    """

    logits: Tensor

    def __post_init__(self) -> None:
        if self.logits.dim() != 1 or not len(self.logits):
            raise ValueError(
                f"logits must have shape (samples,), but got {tuple(self.logits.shape)}."
            )

    def weigh(
        self,
        losses: Tensor,
        mask: Tensor | None = None,
        *,
        index: Tensor | None = None,
        step: int = 0,
        group: Any = None,
    ) -> Reweighting:
        """See `Rule.weigh`; `index` is needed, each sample once, and `step` is not used.

        In a group every process holds all of θ.

        Raises:
            TypeError: see there.
            ValueError: see there; or weights that sum to zero.
            FloatingPointError: see there.
        """
        batch = gathered(losses, mask, index, group, known=len(self.logits))
        found = self.weights(batch.index[batch.counts])
        if not found.detach().isfinite().all():
            raise ValueError(
                f"the weights of samples {batch.index[batch.counts].tolist()} sum to zero, or θ is "
                "not finite."
            )
        return scattered(batch, found)

    def weights(self, index: Tensor) -> Tensor:
        """Return w of the samples of a batch, shape (batch,); NaN where all σ(θ) are zero."""
        sigmoid = self.logits[index].sigmoid()
        return sigmoid / sigmoid.sum()
