"""Layer-adaptive pruning: ratios that distort the network's output least, by a knapsack.

    δ_l(d) = distortion of the logits when layer l alone loses its d/D smallest weights
    min Σ_l δ_l(d_l)  s. t.  Σ_l (1 − d_l/D) n_l ≤ (1 − s_k) Σ_l n_l,   s_k = min(s, 1 − (1 − a)^k)

Round k of pruning is followed by training with the masks fixed, until the sparsity s is reached.
Trained: all weights that are left, biases and the last layer; pruned weights stay zero, and masks
only shrink.  Distortion: the mean over calibration samples of the squared error of the logits, or
the worst sample's.  Ratios end at max_ratio < 1, or at the round's sparsity if that is more: curves
saturate, and without an end a whole layer may go.

Allocators for comparison, at the same number of weights: uniform, global magnitude, ERK, LAMP.

Source: Xu et al., Efficient joint optimization of layer-adaptive weight pruning, ICCV 2023,
sections 3.1 to 3.3.  The published dynamic program drops a term and rounds; this one is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adapters import allocate
from adapters.finetune import DECAY, FineTune, head_of, learning_rate
from adapters.functional import parametrized
from adapters.method import State, every
from adapters.reparam import adaptable
from adapters.select import top_k
from bilevel.domains import Choice, Float, Int
from bilevel.space import Space

__all__ = ["LayerAdaptivePruning", "Mask", "distortion_curves", "mask", "masks", "prune"]

TABLE = 100_000
"""Units of weights in the dynamic program."""


class Mask(nn.Module):
    """The parametrization W ⊙ mask.

    Attributes:
        mask: ones where weights are kept, in the dtype of the weight.
    """

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the masked weight."""
        return weight * self.mask


def masks(model: nn.Module) -> dict[str, Mask]:
    """Return the masks of a model by the name of their module."""
    return parametrized(model, Mask)


def mask(model: nn.Module, names: Iterable[str]) -> dict[str, Mask]:
    """Put a mask of ones on the weights of some modules, in place; see `masks`."""
    places = adaptable(model)
    for name in names:
        place = places[name]
        parametrize.register_parametrization(place.module, place.tensor, Mask(place.weight))
    return masks(model)


@torch.no_grad()
def distortion_curves(
    model: nn.Module,
    inputs: Tensor,
    ratios: Sequence[float],
    kind: Literal["mean", "worst"] = "mean",
) -> dict[str, list[float]]:
    """Return δ_l at each ratio: layer l alone is left with its largest weights.

    Masks are restored.  Takes len(ratios) forward passes a layer, in evaluation mode.

    Args:
        model: with masks, see `mask`; maps inputs to outputs.
        inputs: calibration samples.
        ratios: shares of each layer that are pruned, in [0, 1].
        kind: mean over samples of the mean squared error of the outputs, or the worst sample's.

    Raises:
        ValueError: no mask, no sample, or an unknown kind.
    """
    layers, training = masks(model), model.training
    if not layers:
        raise ValueError("model carries no masks; put them on with mask(model, names).")
    if not len(inputs):
        raise ValueError("inputs must hold at least one calibration sample, but is empty.")
    if kind not in ("mean", "worst"):
        raise ValueError(f"kind must be 'mean' or 'worst', but got {kind!r}.")
    model.eval()
    before = model(inputs)
    curves = {}
    for name, layer in layers.items():
        size = adaptable(model)[name].weight.abs()
        saved, curve = layer.mask.clone(), []
        for ratio in ratios:
            layer.mask.copy_(saved * top_k(size, kept_after(size.numel(), ratio)))
            errors = (model(inputs) - before).square().flatten(1).mean(dim=1)
            curve.append(float(errors.mean() if kind == "mean" else errors.max()))
        layer.mask.copy_(saved)
        curves[name] = curve
    model.train(training)
    return curves


def kept_after(size: int, ratio: float) -> int:
    """Return how many weights are left after a share is pruned: ⌊(1 − φ) n⌋."""
    return size - math.ceil(ratio * size - 1e-9)


def prune(weights: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Return masks of the largest weights of each layer, exactly as many as asked."""
    return {name: top_k(w.detach().abs(), counts[name]) for name, w in weights.items()}


class LayerAdaptivePruning(FineTune):
    """Layer-adaptive pruning by rate and distortion, in rounds (Xu et al., ICCV 2023)."""

    name = "layer_adaptive_pruning"
    space = Space(
        lr=learning_rate(1e-3),
        weight_decay=DECAY,
        sparsity=Float(0.0, 0.99, default=0.8, doc="share s of hidden weights that goes"),
        fraction=Float(0.05, 1.0, default=0.5, doc="share a of what is left that a round takes"),
        round_steps=Int(1, 100_000, log=True, default=50, doc="training steps between two rounds"),
        grid=Int(10, 200, default=50, doc="points D of a curve"),
        samples=Int(32, 2048, log=True, default=256, doc="calibration samples of the curves"),
        distortion=Choice("worst", "mean", default="worst", doc="over calibration samples"),
        max_ratio=Float(0.5, 1.0, default=0.98, doc="most that a layer may lose"),
        allocator=Choice(
            "rate_distortion",
            "uniform",
            "global",
            "erk",
            "lamp",
            default="rate_distortion",
            doc="how layers share the weights",
        ),
    ).own(lr="sampler")

    def attach(self, model: nn.Module) -> None:
        """Put masks on the hidden weights, and prune the first round."""
        mask(model, [name for name in adaptable(model) if name != head_of(model)])
        self.memory["round"] = 0
        self._prune(model)

    @every("round_steps")
    def next_round(self, state: State) -> None:
        """Prune a round while the sparsity is not reached."""
        if self._target(self.memory["round"]) < self.setting.constants["sparsity"]:
            with torch.no_grad():
                named = dict(state.model.named_parameters())
                for name, value in state.params.items():
                    named[name].copy_(value)
            self._prune(state.model)

    def _target(self, number: int) -> float:
        c = self.setting.constants
        return float(min(c["sparsity"], 1 - (1 - c["fraction"]) ** number))

    @torch.no_grad()
    def _prune(self, model: nn.Module) -> None:
        """Take the next round's share of the weights."""
        self.memory["round"] += 1
        layers = masks(model)
        weights = {n: adaptable(model)[n].weight.detach() for n in layers}
        sizes = {n: w.numel() for n, w in weights.items()}
        kept = {n: int(m.mask.sum()) for n, m in layers.items()}
        budget = int((1 - self._target(self.memory["round"])) * sum(sizes.values()))
        counts = self._counts(model, weights, kept, budget)
        for name, mask in prune(weights, counts).items():
            layers[name].mask.copy_(mask)

    def _counts(
        self, model: nn.Module, weights: Mapping[str, Tensor], kept: Mapping[str, int], budget: int
    ) -> dict[str, int]:
        """Return how many weights each layer keeps, never more than it has."""
        c, sizes = self.setting.constants, {n: w.numel() for n, w in weights.items()}
        if c["allocator"] == "uniform":
            return allocate.proportional({n: float(s) for n, s in sizes.items()}, kept, budget)
        if c["allocator"] == "global":
            return allocate.global_threshold({n: w.abs() for n, w in weights.items()}, budget)
        if c["allocator"] == "erk":
            dims = {n: float(sum(w.shape)) for n, w in weights.items()}
            return allocate.proportional(dims, kept, budget)
        if c["allocator"] == "lamp":
            return allocate.lamp(weights, budget)
        total = sum(sizes.values())
        unit = max(1, math.ceil(total / TABLE))
        # With coarse units each layer may cost a unit more than it keeps.
        most = max(c["max_ratio"], min(1.0, 1 - budget / total + len(sizes) * unit / total))
        grid = [most * i / c["grid"] for i in range(c["grid"] + 1)]
        data = self.setting.task.split("train")["x"][: c["samples"]]
        curves = distortion_curves(model, data, grid, c["distortion"])
        points = {n: [min(kept_after(sizes[n], r), kept[n]) for r in grid] for n in sizes}
        chosen = allocate.rate_distortion(curves, points, budget, unit=unit)
        return {n: points[n][d] for n, d in chosen.items()}
