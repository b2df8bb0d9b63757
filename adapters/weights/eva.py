"""EVA: LoRA in the principal directions of a layer's inputs, with ranks moved between layers.

    W = W₀ + s B A,   A = diag((σ/σ₁)^{−p}) V_rᵀ at the start, B = 0
    V_r: top-r right singular vectors of the layer's centered inputs on training data

Ranks: of all components of all layers, the N r with the largest explained variance are kept, at
most round(ρ r) in a layer; a layer may get none.  ρ = 1 keeps r everywhere.  The scale alpha/r is
the same for every rank.  Trained: A, B and the last layer; frozen: W₀ and the biases.

The inputs are decomposed exactly, on all calibration data at once, so that the published stopping
rule for a stream of batches (τ) does not appear.  p is ours: 0 is EVA.

Source: Paischer et al., EVA, arXiv 2410.07170, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters.finetune import DECAY, learning_rate
from adapters.reparam import Parts, Reparam, Start, adaptable
from adapters.reparam.base import Need, signed_svd, wide
from adapters.reparam.calibrate import Calibrate, collect
from adapters.weights.method import WeightAdapter
from bilevel.domains import Choice, Float, Grad, Int, Switch
from bilevel.space import Space

__all__ = ["EVA", "EVAMethod", "redistribute"]


@dataclass(frozen=True)
class EVA(Reparam):
    """W = W₀ + s B A, with A in the principal directions of the inputs.

    Attributes:
        rank: r.
        scale: s.
        center: whether the mean of the inputs is subtracted (the published code does).
        exponent: p.
    """

    rank: int = 4
    scale: float | Tensor = 1.0
    center: bool = True
    exponent: float | Tensor = 0.0

    @property
    def needs(self) -> frozenset[Need]:
        """Inputs of the layer."""
        return frozenset({"inputs"})

    def start(self, start: Start) -> Parts:
        assert start.inputs is not None
        r, (rows, columns) = start.check_rank(self.rank), start.weight.shape
        sigma, vt = components(start.name, start.inputs, r, self.center)
        relative = (sigma / sigma[0]).clamp(min=torch.finfo(sigma.dtype).eps)
        trained = {"A": start.zeros(r, columns), "B": start.zeros(rows, r)}
        return Parts(trained, {"V": vt.to(start.weight), "sigma": relative.to(start.weight)})

    def weight(self, w: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        a = parts["V"] * (parts["sigma"] ** -self.exponent)[:, None] + parts["A"]
        return w + self.scale * (parts["B"] @ a)


def components(name: str, inputs: Tensor, count: int, center: bool) -> tuple[Tensor, Tensor]:
    """Return the top singular values and right singular vectors of rows, in at least float32.

    Raises:
        ValueError: fewer rows than components.
    """
    if len(inputs) < count + center:
        raise ValueError(
            f"{name}: {count} components need at least {count + center} calibration rows, but "
            f"got {len(inputs)}."
        )
    inputs = wide(inputs)
    rows = inputs - inputs.mean(dim=0) if center else inputs
    _, sigma, vt = signed_svd(rows)
    return sigma[:count], vt[:count]


def redistribute(
    model: nn.Module,
    reparam: EVA,
    targets: Sequence[str],
    calibrate: Calibrate,
    *,
    headroom: float = 2.0,
    metric: Literal["ratio", "raw", "sum", "max"] = "ratio",
) -> dict[str, EVA]:
    """Move the rank budget len(targets) · rank to the layers whose inputs explain most variance.

    Args:
        model: without maps.
        reparam: with the mean rank r.
        targets: names of layers.
        calibrate: see `adapters.reparam.attach`.
        headroom: ρ ≥ 1; no layer gets more than round(ρ r), nor more than its weight has.
        metric: of component j of a layer: its share of the variance ("ratio"), its variance
            ("raw"), or its singular value relative to their sum ("sum") or largest ("max").

    Returns:
        A map for each layer that keeps a component; ranks sum to the budget.

    Raises:
        ValueError: headroom below 1, an unknown metric, or ranks that the layers cannot hold.
    """
    if not headroom >= 1:
        raise ValueError(f"headroom must be at least 1, but got {headroom}.")
    places = {name: adaptable(model)[name] for name in targets}
    given = collect(model, places, frozenset({"inputs"}), calibrate)
    scores, owners = [], []
    for name, place in places.items():
        most = min(round(headroom * reparam.rank), *place.weight.flatten(1).shape)
        inputs = wide(cast(Tensor, given[name][0]))
        sigma, _ = components(name, inputs, min(most, len(inputs) - reparam.center), reparam.center)
        rows = inputs - inputs.mean(dim=0) if reparam.center else inputs
        total = rows.square().sum()
        known = {
            "ratio": sigma.square() / total,
            "raw": sigma.square() / len(inputs),
            "sum": sigma / torch.linalg.svdvals(rows).sum(),
            "max": sigma / sigma[0],
        }
        if metric not in known:
            raise ValueError(f"metric must be one of {sorted(known)}, but got {metric!r}.")
        scores.append(known[metric])
        owners += [name] * len(sigma)
    budget = reparam.rank * len(targets)
    if len(owners) < budget:
        raise ValueError(f"rank {reparam.rank} asks for {budget} components of {len(owners)}.")
    # Stable: ties go to the earlier layer and component.
    kept = torch.cat(scores).argsort(descending=True, stable=True)[:budget].tolist()
    counts = {name: sum(owners[i] == name for i in kept) for name in targets}
    return {n: dataclasses.replace(reparam, rank=c) for n, c in counts.items() if c}


class EVAMethod(WeightAdapter):
    """EVA: LoRA in the principal directions of the inputs (Paischer et al., 2024)."""

    name = "eva"
    reparam = EVA
    space = Space(
        lr=learning_rate(0.01),
        weight_decay=DECAY,
        scale=Grad(1.0, low=0.1, high=64.0, scale="log", doc="factor s = alpha/r; smooth"),
        exponent=Grad(0.0, low=-0.5, high=1.0, doc="whitening p of the start, 0 none; smooth"),
        headroom=Float(1.0, 3.0, default=1.0, doc="ρ: no layer gets more than ρ r"),
        metric=Choice("ratio", "raw", "sum", "max", default="ratio", doc="what ranks compete by"),
        center=Switch(default=True, doc="subtract the mean of the inputs"),
        samples=Int(16, 1000, log=True, default=100, doc="training samples that are decomposed"),
        rank=Int(1, 32, log=True, default=4, doc="mean rank r"),
    ).own(lr="sampler")

    def choose(self, model: nn.Module) -> Mapping[str, Reparam]:
        """The layers with the ranks that they get."""
        constants = self.setting.constants
        return redistribute(
            model,
            cast(EVA, self.settings()),
            self.targets(model),
            self.calibrate,
            headroom=constants["headroom"],
            metric=constants["metric"],
        )

    def calibrate(self, model: nn.Module) -> Tensor:
        """Run the first training samples."""
        data = self.setting.task.split("train")
        rows = slice(self.setting.constants["samples"])
        return F.cross_entropy(model(data["x"][rows]), data["y"][rows])
