"""GaLore: Adam in the top singular directions of the gradient, the baseline of its family.

    every T steps: P = top-r singular vectors of G on its smaller side;  W ← W − η s P Adam(Pᵀ G)

Everything is trained; hidden weights are projected, the rest is updated in full.  Moments are kept
at a refresh as they are ("keep", published), carried to the new basis ("move") or reset.  State:
2 r max(m, n) moments and a basis of r min(m, n) numbers for each projected matrix.

Source: Zhao et al., GaLore, ICML 2024, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable

from adapters.finetune import ADAM_OWNERS, DECAY, EPS, adam, betas, learning_rate
from adapters.sparse.method import SplitTune
from adapters.split import Basis, Split
from bilevel.domains import Choice, Grad, Int
from bilevel.space import Space
from hypergrad.optimizers import Value

__all__ = ["GaLore"]


class GaLore(SplitTune):
    """GaLore: Adam in the top singular directions of the gradient (Zhao et al., ICML 2024)."""

    name = "galore"
    space = Space(
        lr=learning_rate(3e-3),
        weight_decay=DECAY,
        scale=Grad(1.0, low=0.05, high=8.0, scale="log", doc="factor s of projected steps; smooth"),
        **betas(),
        eps=EPS,
        rank=Int(1, 32, log=True, default=8, doc="directions r"),
        refresh=Int(1, 1000, log=True, default=50, doc="steps T between two bases"),
        transport=Choice("keep", "move", "reset", default="keep", doc="moments at a refresh"),
    ).own(lr="sampler", scale="sampler", **ADAM_OWNERS)

    def split(self, hyper: Callable[[str], Value]) -> Split:
        """Adam in the top singular directions."""
        c = self.setting.constants
        return Split(
            adam(hyper),
            Basis(c["rank"], "svd"),
            tuple(self.parts.values()),
            refresh=c["refresh"],
            transport=c["transport"],
            projected_scale=hyper("scale"),
        )
