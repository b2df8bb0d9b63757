"""LIFT: the entries that are largest in a low-rank approximation of the weight are trained.

    W_r = best rank-r approximation of W;  support: the k = min((m + n) R, m n) largest |W_r|
    Adam on the support; every T steps a new support from the current W, moments carried along

Trained: k entries of each hidden weight and, with "head", the last layer; frozen: everything else.
Entries that leave the support keep their value.  Moments of entries that enter start at zero, with
a step count of their own, so that their first step is a first step; published code carries the old
count, which makes it up to 3.2 η.  The released configurations select the smallest entries; the
paper, and the default here, the largest.

Source: Liu et al., LIFT the veil for the truth, ICML 2025, arXiv 2506.00772, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from adapters.finetune import ADAM_OWNERS, DECAY, EPS, adam, betas, learning_rate
from adapters.select import low_rank
from adapters.sparse.method import HEAD, SparseTune
from adapters.split import Coordinates, Split
from bilevel.domains import Choice, Int
from bilevel.space import Space
from hypergrad.optimizers import Value

__all__ = ["LIFT", "lift_projector"]


def lift_projector(filter_rank: int, budget_rank: int, *, largest: bool = True) -> Coordinates:
    """Return the projector on the k = min((m + n) R, m n) entries with the largest |W_r|.

    Raises:
        ValueError: a rank below 1.
    """
    if filter_rank < 1 or budget_rank < 1:
        raise ValueError(
            f"ranks must be at least 1, but got filter {filter_rank} and budget {budget_rank}."
        )

    def score(weight: Tensor) -> Tensor:
        return low_rank(weight, filter_rank)

    def count(weight: Tensor) -> int:
        return min(sum(weight.shape) * budget_rank, weight.numel())

    return Coordinates(score, count, largest)


class LIFT(SparseTune):
    """LIFT: train the principal entries of each hidden weight (Liu et al., ICML 2025)."""

    name = "lift"
    space = Space(
        lr=learning_rate(5e-3),
        weight_decay=DECAY,
        **betas(0.95),
        eps=EPS,
        budget_rank=Int(1, 256, log=True, default=4, doc="R: as many entries as LoRA of rank R"),
        filter_rank=Int(1, 256, log=True, default=8, doc="rank r of the approximation"),
        refresh=Int(1, 5000, log=True, default=100, doc="steps T between two supports"),
        head=HEAD,
        direction=Choice("largest", "smallest", default="largest", doc="which entries are trained"),
    ).own(lr="sampler", **ADAM_OWNERS)

    def split(self, hyper: Callable[[str], Value]) -> Split:
        """Adam on the support."""
        c = self.setting.constants
        largest = c["direction"] == "largest"
        return Split(
            adam(hyper),
            lift_projector(c["filter_rank"], c["budget_rank"], largest=largest),
            tuple(self.parts.values()),
            refresh=c["refresh"],
            transport="move",
        )
