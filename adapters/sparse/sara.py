"""SaRA: weights below a threshold are trained, with a nuclear-norm penalty on them.

    M = 1[|W₀| < θ],   loss + λ ‖W ⊙ M‖_*,   Adam on the entries of M
    at step T_p:  M ← M ∧ 1[|W| < θ], and the optimizer starts anew

Trained: entries of the hidden weights below θ and, with "head", the last layer; frozen: the rest.
θ is absolute ("threshold"), or the quantile that takes the given share of each tensor ("share").
The penalty is on matrices whose smaller side exceeds min_dim, by default on one of them a step,
drawn uniformly.  It is differentiated through the SVD: U Vᵀ of a detached matrix makes the
hypergradient of λ 14 % wrong.  Published code writes |W| into the model for one forward, and in its
main optimizer never applies the penalty.

Source: Hu et al., SaRA, ICLR 2025, arXiv 2409.06633, sections 3.2 to 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.finetune import DECAY, learning_rate
from adapters.method import State
from adapters.sparse.method import HEAD, SparseTune
from adapters.split import Coordinates, Split
from bilevel.domains import Choice, Float, Grad, Int
from bilevel.space import Space
from hypergrad.optimizers import Adam, Value

__all__ = ["SaRA", "sara_projector"]


def sara_projector(threshold: float | None = None, share: float | None = None) -> Coordinates:
    """Return the projector on entries with |w| < θ, or on the smallest share of each tensor.

    Raises:
        ValueError: neither or both given, θ ≤ 0, or a share outside (0, 1].
    """
    if (threshold is None) == (share is None):
        raise ValueError(f"give threshold or share, but got {threshold} and {share}.")
    if threshold is not None and threshold <= 0:
        raise ValueError(f"threshold must be positive, but got {threshold}: nothing would train.")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], but got {share}.")

    def count(weight: Tensor) -> int:
        if threshold is not None:
            return int((weight.abs() < threshold).sum())
        assert share is not None
        return max(1, round(share * weight.numel()))

    return Coordinates(torch.abs, count, largest=False, shrink=True)


class SaRA(SparseTune):
    """SaRA: train the smallest weights, kept near low rank (Hu et al., ICLR 2025)."""

    name = "sara"
    space = Space(
        lr=learning_rate(5e-3),
        weight_decay=DECAY,
        nuclear=Grad(5e-4, low=1e-6, high=1e-2, scale="log", doc="weight λ of ‖W⊙M‖_*; smooth"),
        mode=Choice("share", "threshold", default="share", doc="how the entries are counted"),
        threshold=Float(1e-4, 2e-2, log=True, default=2e-3, doc="θ", when={"mode": "threshold"}),
        share=Float(0.01, 0.5, log=True, default=0.1, doc="of each tensor", when={"mode": "share"}),
        reselect=Int(1, 100_000, log=True, default=200, doc="step T_p of the second selection"),
        min_dim=Int(1, 1024, log=True, default=64, doc="smaller side above which λ acts"),
        head=HEAD,
        sampling=Choice("one", "all", default="one", doc="matrices under the penalty in a step"),
    ).own(lr="sampler")

    def attach(self, model: nn.Module) -> None:
        """Choose the first entries.

        Raises:
            ValueError: no hidden weight is below the threshold, and the last layer is frozen, too.
        """
        super().attach(model)
        flat = torch.cat(
            [dict(model.named_parameters())[n].detach().reshape(-1) for n in self.parts]
        )
        parts = tuple(self.parts.values())
        self.memory["index"] = self._projector().fit(parts, flat, flat, 0, None)["index"]

    def _projector(self) -> Coordinates:
        c = self.setting.constants
        return sara_projector(c.get("threshold"), c.get("share"))

    def split(self, hyper: Callable[[str], Value]) -> Split:
        """Adam on the entries, chosen twice."""
        return Split(
            Adam(hyper("lr"), eps=1e-6),
            self._projector(),
            tuple(self.parts.values()),
            refresh=self.setting.constants["reselect"],
            refreshes=1,
        )

    def after_step(self, state: State) -> None:
        """Remember the entries that the optimizer trains."""
        index = state.optimizer["support/index"]
        if not torch.equal(index, self.memory["index"]):
            self.memory["index"] = index.clone()

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor | None:
        """½ decay ‖θ‖² and λ ‖W ⊙ M‖_*."""
        decay, c = super().penalty(model, hparams), self.setting.constants
        weights = [
            (name, w)
            for name, w in self.split_weights(model).items()
            if min(w.flatten(1).shape) > c["min_dim"]
        ]
        if not weights or decay is None:
            return decay
        if c["sampling"] == "one":
            weights = [weights[int(torch.randint(len(weights), ()))]]
        total = sum(part.size for part in self.parts.values())
        index = self.memory["index"]
        mask = torch.zeros(total, dtype=torch.bool, device=index.device)
        mask[index] = True
        sizes = [part.size for part in self.parts.values()]
        masks = dict(zip(self.parts, mask.split_with_sizes(sizes), strict=True))
        norms = [
            torch.linalg.matrix_norm((w * masks[name].view(w.shape)).flatten(1), ord="nuc")
            for name, w in weights
        ]
        nuclear: Tensor = hparams["nuclear"] * torch.stack(norms).sum()
        return decay + nuclear
