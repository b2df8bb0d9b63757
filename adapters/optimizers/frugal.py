"""FRUGAL: Adam in a subspace that is drawn anew, sign descent in the rest: full-rank steps.

    g_full = P g,  g_free = g − Pᵀ P g;   W ← W + κ_p (Pᵀ Adam(g_full) − η κ_f sign(g_free))

Everything is trained; hidden weights are projected, the rest gets full Adam.  The subspace: whole
tensors ("block", the paper's main setting), random rows, columns or entries, or orthonormal
directions ("svd", "dct", "random").  At a refresh moments are reset by default.  With density 1 and
no refresh it is Adam; with density 0 sign descent; without remainder and with "svd", GaLore.

Source: Zmushko et al., FRUGAL, ICML 2025, arXiv 2411.07837, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

from adapters.finetune import ADAM_OWNERS, DECAY, EPS, adam, betas, learning_rate
from adapters.sparse.method import SplitTune
from adapters.split import Basis, Blocks, Projector, Slices, Split
from bilevel.domains import Choice, Float, Grad, Int
from bilevel.space import Space
from hypergrad.optimizers import Value

__all__ = ["FRUGAL", "frugal_projector"]


def frugal_projector(kind: str, density: float, seed: int = 0) -> Projector:
    """Return the projector of a kind at a density.

    Raises:
        ValueError: an unknown kind, or a density outside [0, 1]; 0 needs entries or tensors.
    """
    if kind == "block":
        return Blocks(density, seed=seed)
    if kind in ("rows", "columns", "entries"):
        return Slices(density, kind, seed)  # type: ignore[arg-type]
    if kind in ("svd", "dct", "random"):
        return Basis(float(density), kind, seed=seed)  # type: ignore[arg-type]
    raise ValueError(
        "projector must be 'block', 'rows', 'columns', 'entries', 'svd', 'dct' or 'random', but "
        f"got {kind!r}."
    )


class FRUGAL(SplitTune):
    """FRUGAL: Adam in a redrawn subspace, sign descent in the rest (Zmushko et al., ICML 2025)."""

    name = "frugal"
    space = Space(
        lr=learning_rate(3e-3),
        weight_decay=DECAY,
        free_scale=Grad(0.1, low=0.01, high=2.0, scale="log", doc="factor κ_f of the rest; smooth"),
        projected_scale=Grad(1.0, low=0.1, high=10.0, scale="log", doc="factor κ_p; smooth"),
        **betas(),
        eps=EPS,
        density=Float(0.05, 1.0, default=0.25, doc="share ρ of the subspace"),
        refresh=Int(1, 1000, log=True, default=50, doc="steps T between two subspaces"),
        projector=Choice(
            "block",
            "columns",
            "rows",
            "entries",
            "svd",
            "dct",
            "random",
            default="block",
            doc="subspace",
        ),
        remainder=Choice("sign", "sgd", "none", default="sign", doc="rule of the rest"),
        transport=Choice("reset", "move", default="reset", doc="moments at a refresh"),
    ).own(lr="sampler", free_scale="sampler", projected_scale="sampler", **ADAM_OWNERS)

    def split(self, hyper: Callable[[str], Value]) -> Split:
        """Adam in the subspace, and the rule of the rest."""
        c = self.setting.constants
        return Split(
            adam(hyper),
            frugal_projector(c["projector"], c["density"], self.setting.seed),
            tuple(self.parts.values()),
            c["remainder"],
            c["refresh"],
            c["transport"],
            free_scale=hyper("free_scale"),
            projected_scale=hyper("projected_scale"),
        )
