"""What companders make of the weights: spread, tails and saturation of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from bilevel.compander import companders

__all__ = ["Distribution", "LayerReport", "distribution", "report"]


@dataclass(frozen=True)
class Distribution:
    """The distribution of a weight tensor, σ its standard deviation.

    Attributes:
        deviation: σ.
        near_zero: share of weights with |w| < σ/10.
        tail: largest |w| in σ.
        kurtosis: excess kurtosis E[(w − E w)⁴]/σ⁴ − 3: 0 for a normal distribution, −1.2 for a
            uniform one, −2 for two values.
    """

    deviation: float
    near_zero: float
    tail: float
    kurtosis: float


@dataclass(frozen=True)
class LayerReport:
    """A compander and its weights.

    Attributes:
        a: amplitude.
        b: width.
        gamma: a/b.
        saturated: share of weights above 90 % of the bound; above .3 training stalls: raise a.
        weights: of w.
    """

    a: float
    b: float
    gamma: float
    saturated: float
    weights: Distribution


@torch.no_grad()
def distribution(weight: Tensor) -> Distribution:
    """Return the distribution of any weight, companded or not.

    Raises:
        ValueError: a weight without spread.
    """
    w = weight.detach().double().flatten()
    deviation = float(w.std(correction=0))
    if not deviation > 0:
        raise ValueError(f"weight must have a spread, but its deviation is {deviation}.")
    size = w.abs() / deviation
    fourth = ((w - w.mean()) / deviation).pow(4).mean()
    return Distribution(
        deviation, float((size < 0.1).double().mean()), float(size.max()), float(fourth) - 3
    )


@torch.no_grad()
def report(model: nn.Module) -> dict[str, LayerReport]:
    """Return what each compander makes of its weights, by the name of the module."""
    found = {}
    for name, each in companders(model).items():
        w = cast(Tensor, model.get_submodule(name).weight)
        a, b = (float(value) for value in each.values)
        beyond = (w.abs() > 0.9 * float(each.limit)).double().mean()
        found[name] = LayerReport(a, b, a / b, float(beyond), distribution(w))
    return found
