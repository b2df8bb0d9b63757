"""GradNormLoRP: GaLore on the directions of a weight-normalized network.

    W = g ⊙ v/‖v‖ row by row;   v ← v − η s P Adam(Pᵀ ∂v),   g ← g − η κ_g Adam(∂g)

Everything is trained; v of each hidden layer is projected on its top-r singular directions, g and
the rest are updated in full.  ∂v is the exact gradient through the normalization, orthogonal to v
in each row; the released code leaves out that part and resets g to ‖v‖ in every step.  The weight
decay acts on g and the rest, not on v, whose length means nothing.

Source: Huang et al., GradNormLoRP, AAAI 2025, arXiv 2412.19616, algorithm 1.  κ_g is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from adapters.finetune import ADAM_OWNERS, DECAY, EPS, adam, betas, head_of, learning_rate
from adapters.reparam import adaptable
from adapters.sparse.method import SplitTune
from adapters.split import Basis, Split
from bilevel.domains import Choice, Grad, Int
from bilevel.space import Space
from hypergrad.optimizers import Value

__all__ = ["GradNormLoRP"]


class _Normalized(nn.Module):
    """W = g ⊙ v/‖v‖ by rows, in plain operations.

    `torch.nn.utils.parametrizations.weight_norm` computes its backward pass by another formula when
    that is to be differentiated, so that unrolled steps would not be the trained ones bit for bit.
    """

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        norms: Tensor = v.flatten(1).square().sum(dim=1).sqrt()
        return v * (g / norms).view(-1, *[1] * (v.dim() - 1))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.flatten(1).square().sum(dim=1).sqrt(), weight


class GradNormLoRP(SplitTune):
    """GradNormLoRP: low-rank gradients of weight-normalized layers (Huang et al., AAAI 2025)."""

    name = "gradnormlorp"
    space = Space(
        lr=learning_rate(3e-3),
        weight_decay=DECAY,
        scale=Grad(1.0, low=0.05, high=8.0, scale="log", doc="factor s of steps of v; smooth"),
        magnitude=Grad(
            1.0, low=0.1, high=10.0, scale="log", doc="factor κ_g of steps of g; smooth"
        ),
        **betas(),
        eps=EPS,
        rank=Int(1, 32, log=True, default=8, doc="directions r"),
        refresh=Int(1, 1000, log=True, default=50, doc="steps T between two bases"),
        side=Choice("smaller", "larger", "left", "right", default="smaller", doc="side of P"),
        transport=Choice("keep", "move", "reset", default="keep", doc="moments at a refresh"),
    ).own(lr="sampler", scale="sampler", magnitude="sampler", **ADAM_OWNERS)

    def attach(self, model: nn.Module) -> None:
        """Normalize the hidden weights.

        Raises:
            ValueError: a row of a weight is zero, so it has no direction.
        """
        for name, place in adaptable(model).items():
            if name == head_of(model):
                continue
            rows = place.weight.detach().flatten(1).norm(dim=1)
            if not rows.all():
                raise ValueError(
                    f"{name}: row {int(rows.argmin())} of its weight is zero and has no direction."
                )
            parametrize.register_parametrization(place.module, place.tensor, _Normalized())
        super().attach(model)
        self.parts = {
            n: replace(part, marked=n.endswith("original0")) for n, part in self.parts.items()
        }

    def split_names(self, model: nn.Module) -> list[str]:
        """The directions."""
        return [n for n, _ in model.named_parameters() if n.endswith("weight.original1")]

    def undecayed(self, model: nn.Module) -> Collection[str]:
        """The directions."""
        return self.split_names(model)

    def split(self, hyper: Callable[[str], Value]) -> Split:
        """Adam in the top singular directions of ∂v."""
        c = self.setting.constants
        return Split(
            adam(hyper),
            Basis(c["rank"], "svd", side=c["side"]),
            tuple(self.parts.values()),
            refresh=c["refresh"],
            transport=c["transport"],
            projected_scale=hyper("scale"),
            marked_scale=hyper("magnitude"),
        )

    def finish(self, model: nn.Module, hparams: Mapping[str, Any]) -> nn.Module:
        """Replace each normalized weight by its value."""
        for module in list(model.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        return model
