"""DCT-AdamW: Adam along the columns of a fixed DCT where the gradient is largest, with feedback.

    A = G + E,  S = A Q,  the r columns of S with the largest norm,  E ← A − S_r Q_rᵀ
    moments follow their column;  W ← W − η Adam(S_r) Q_rᵀ

Everything is trained; hidden weights are projected, the rest is updated in full.  No SVD: a layer
stores r indices, and the DCT matrix is shared.  With error feedback what is projected out returns
in the next step: Σ_t S_r Q_rᵀ + E_T = Σ_t G_t.  Columns that enter start with fresh moments and a
step count of their own.

Source: Modoranu et al., FFT-based dynamic subspace selection, arXiv 2505.17967, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

from adapters.finetune import ADAM_OWNERS, DECAY, EPS, adam, betas, learning_rate
from adapters.sparse.method import SplitTune
from adapters.split import Basis, Split
from bilevel.domains import Choice, Int, Switch
from bilevel.space import Space
from hypergrad.optimizers import Value

__all__ = ["DCTAdamW"]


class DCTAdamW(SplitTune):
    """DCT-AdamW: Adam along the largest DCT columns, with feedback (Modoranu et al., 2025)."""

    name = "dct_adamw"
    space = Space(
        lr=learning_rate(3e-3),
        weight_decay=DECAY,
        **betas(),
        eps=EPS,
        rank=Int(1, 32, log=True, default=8, doc="columns r"),
        refresh=Int(1, 500, log=True, default=1, doc="steps T between two choices"),
        norm=Choice(1, 2, default=1, doc="norm that ranks the columns"),
        error_feedback=Switch(default=True, doc="return what is projected out to the next step"),
        transport=Choice("move", "keep", "reset", default="move", doc="moments at a choice"),
        basis=Choice("dct", "random", default="dct", doc="fixed DCT, or redrawn random directions"),
    ).own(lr="sampler", **ADAM_OWNERS)

    def split(self, hyper: Callable[[str], Value]) -> Split:
        """Adam along the chosen columns."""
        c = self.setting.constants
        return Split(
            adam(hyper),
            Basis(c["rank"], c["basis"], c["norm"], self.setting.seed),
            tuple(self.parts.values()),
            refresh=c["refresh"],
            transport=c["transport"],
            error_feedback=c["error_feedback"],
        )
