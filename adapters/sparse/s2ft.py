"""S2FT: the weights of a few hidden units are trained, whole rows in and whole columns out.

    unit j of hidden layer l ties row j of W_l ("up") to column j of W_{l+1} ("down")
    trained: the rows of round(u N) units, the columns of round(d N) units, N all hidden units

Trained: these slices and, with "head", the last layer; frozen: the rest.  A unit of the last hidden
layer has its column in the last layer, which is trained whole or not at all.  Permuting units would
make the slices contiguous, as the published kernels do; the coordinates here give the same numbers
and no saving of activations.  Counts are drawn over the whole network ("global"), so a layer may
get none, or evenly.

Selection: "random", or the largest (+) or smallest (−) mean |weight| (W), |activation| (A), their
product (S) or |gradient| (G) on the training samples.

Source: Yang et al., S2FT, NeurIPS 2024, arXiv 2412.06289, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from adapters.finetune import DECAY, head_of, learning_rate
from adapters.reparam import adaptable
from adapters.reparam.calibrate import collect
from adapters.select import top_k_global
from adapters.sparse.method import HEAD, SparseTune
from adapters.split import Fixed, Split
from bilevel.domains import Choice, Float
from bilevel.space import Space
from hypergrad.optimizers import Adam, Value

__all__ = ["S2FT"]

SELECTIONS = ("random", "W+", "W-", "A+", "A-", "S+", "S-", "G+", "G-")


class S2FT(SparseTune):
    """S2FT: train whole rows and columns of a few hidden units (Yang et al., NeurIPS 2024)."""

    name = "s2ft"
    space = Space(
        lr=learning_rate(5e-3),
        weight_decay=DECAY,
        up=Float(0.0, 0.5, default=0.05, doc="share u of units whose rows are trained"),
        down=Float(0.0, 0.5, default=0.05, doc="share d of units whose columns are trained"),
        selection=Choice(*SELECTIONS, default="random", doc="which units"),
        head=HEAD,
        allocation=Choice("global", "equal", default="global", doc="how layers share the units"),
    ).own(lr="sampler")

    def attach(self, model: nn.Module) -> None:
        """Choose the units.

        Raises:
            ValueError: no layer follows another, or both shares are zero.
        """
        super().attach(model)
        layers = list(adaptable(model))
        weights = {n: adaptable(model)[n].weight.detach() for n in layers}
        hidden = [n for n in layers if n != head_of(model)]
        sizes = [weights[n].shape[0] for n in hidden]
        follows = [weights[n].flatten(1).shape[1] for n in layers[1:]]
        if sizes != follows[: len(sizes)]:
            raise ValueError(f"s2ft needs layers that feed each other, but got units {sizes}.")
        constants = self.setting.constants
        if round(constants["up"] * sum(sizes)) + round(constants["down"] * sum(sizes)) == 0:
            raise ValueError("up and down choose no unit, so nothing would be trained.")
        scores = self._scores(model, hidden)
        rows, columns = (self._units(scores, constants[key]) for key in ("up", "down"))
        masks = []
        for name in (n.removesuffix(".weight") for n, p in self.parts.items() if p.split):
            mask = torch.zeros_like(weights[name], dtype=torch.bool)
            mask[rows[name]] = True
            before = hidden.index(name) - 1
            if before >= 0:
                mask[:, columns[hidden[before]]] = True
            masks.append(mask)
        self.masks = masks

    def _scores(self, model: nn.Module, hidden: list[str]) -> dict[str, Tensor]:
        """Return a score of each unit, the larger the better."""
        selection = self.setting.constants["selection"]
        places = {n: adaptable(model)[n] for n in hidden}
        if selection == "random":
            return {n: torch.rand(p.weight.shape[0]).to(p.weight.device) for n, p in places.items()}
        found, kind, sign = {}, selection[0], 1.0 if selection[1] == "+" else -1.0
        after = dict(zip(hidden, list(adaptable(model))[1:], strict=False))
        inputs = {n: adaptable(model)[after[n]] for n in hidden}
        given = collect(
            model, {after[n]: p for n, p in inputs.items()}, frozenset({"inputs"}), self.calibrate
        )
        gradients = (
            collect(model, places, frozenset({"gradient"}), self.calibrate) if kind == "G" else {}
        )
        for name, place in places.items():
            weight = place.weight.detach().flatten(1).abs().mean(dim=1)
            activations, _ = given[after[name]]
            assert activations is not None
            activity = activations.abs().mean(dim=0)
            score = {"W": weight, "A": activity, "S": weight * activity}.get(kind)
            if score is None:
                gradient = gradients[name][1]
                assert gradient is not None
                score = gradient.abs().mean(dim=1)
            found[name] = sign * score
        return found

    def _units(self, scores: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        """Return masks of the chosen units of each layer."""
        if self.setting.constants["allocation"] == "global":
            return top_k_global(scores, round(share * sum(len(s) for s in scores.values())))
        return {n: top_k_global({n: s}, round(share * len(s)))[n] for n, s in scores.items()}

    def split(self, hyper: Callable[[str], Value]) -> Split:
        """Adam on the slices."""
        parts = tuple(self.parts.values())
        return Split(Adam(hyper("lr"), (0.9, 0.95), eps=1e-6), Fixed(self.masks), parts)
