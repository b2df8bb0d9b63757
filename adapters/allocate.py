"""Exact integer budgets: how many entries each layer keeps, Σ counts = budget.

uniform           proportional to sizes
proportional      proportional to weights, with caps (water-filling)
global_threshold  the best scores of all layers together
lamp              the same with LAMP scores w² / Σ_{|v| ≥ |w|} v² (Lee et al., 2021)
erk               Erdős–Rényi kernel densities ∝ Σ dims / Π dims (Evci et al., 2020)
rate_distortion   min Σ_l δ_l(d_l) s. t. Σ_l kept_l(d_l) ≤ budget, by dynamic programming
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapters.select import top_k_global

__all__ = [
    "erk",
    "global_threshold",
    "lamp",
    "lamp_score",
    "proportional",
    "rate_distortion",
    "uniform",
]


def uniform(sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Return counts proportional to sizes."""
    return proportional({n: float(s) for n, s in sizes.items()}, sizes, budget)


def proportional(
    weights: Mapping[str, float], caps: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Return counts proportional to weights where no cap binds.

    Layers whose share exceeds their cap are full, and the rest is shared again (water-filling).
    What rounding leaves over goes to the largest fractions, ties to the earlier layer.

    Raises:
        ValueError: other names, a negative weight, no positive one, or a budget outside
            0 ... Σ caps.
    """
    if set(weights) != set(caps):
        raise ValueError(f"weights are for {sorted(weights)}, but caps for {sorted(caps)}.")
    _check_budget(budget, sum(caps.values()))
    if any(not 0 <= w < math.inf for w in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights must not be negative, and not all zero, but got {weights}.")
    full: set[str] = {n for n in weights if not weights[n]} if budget == 0 else set()
    open_ = [n for n in weights if n not in full]
    left, shares = budget, dict.fromkeys(weights, 0.0)
    while open_:
        total = sum(weights[n] for n in open_)
        if not total:  # only weights of zero are left: share evenly
            weights = {**weights, **dict.fromkeys(open_, 1.0)}
            continue
        over = [n for n in open_ if left * weights[n] / total >= caps[n]]
        if not over:
            shares |= {n: left * weights[n] / total for n in open_}
            break
        for name in over:
            shares[name] = float(caps[name])
            left -= caps[name]
        open_ = [n for n in open_ if n not in over]
    counts = {n: min(int(s), caps[n]) for n, s in shares.items()}
    order = sorted(counts, key=lambda n: counts[n] - shares[n])  # stable
    missing = budget - sum(counts.values())
    while missing:
        for name in order:
            if missing and counts[name] < caps[name]:
                counts[name] += 1
                missing -= 1
    return counts


def global_threshold(scores: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return how many of the `budget` best scores of all layers each layer has."""
    return {n: int(mask.sum()) for n, mask in top_k_global(scores, budget).items()}


def lamp_score(weight: Tensor) -> Tensor:
    """Return w² / Σ_{v: |v| ≥ |w|} v² of a layer; the largest weight of a layer has score 1."""
    flat = weight.detach().reshape(-1).double().square()
    order = flat.argsort(stable=True)
    ascending = flat[order]
    rest = ascending.flip(0).cumsum(0).flip(0)
    score = torch.empty_like(flat)
    score[order] = ascending / rest.clamp(min=torch.finfo(rest.dtype).tiny)
    return score.view(weight.shape)


def lamp(weights: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return counts by LAMP scores; each layer keeps at least one while the budget allows it."""
    return global_threshold({n: lamp_score(w) for n, w in weights.items()}, budget)


def erk(shapes: Mapping[str, Sequence[int]], budget: int) -> dict[str, int]:
    """Return counts with densities ∝ Σ dims / Π dims; layers above 1 are dense."""
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    return proportional({n: float(sum(s)) for n, s in shapes.items()}, sizes, budget)


def rate_distortion(
    curves: Mapping[str, Sequence[float]],
    kept: Mapping[str, Sequence[int]],
    budget: int,
    *,
    unit: int = 1,
) -> dict[str, int]:
    """Choose a point of each layer's curve: least total distortion within a budget of weights.

    The integer knapsack is solved exactly: g_l(j) = min_d δ_l(d) + g_{l−1}(j − kept_l(d)).

    Args:
        curves: distortion δ_l(d) at each point.
        kept: weights that layer l keeps at each point.
        budget: most weights kept by all layers.
        unit: weights are counted in units of this many, rounded up, which bounds the table for
            large networks; 1 is exact.

    Returns:
        The point of each layer; ties go to fewer weights kept.

    Raises:
        ValueError: other names or lengths, distortions that are not finite, or a budget below the
            least.
    """
    if set(curves) != set(kept) or not curves:
        raise ValueError(f"curves are for {sorted(curves)}, but kept for {sorted(kept)}.")
    for name, curve in curves.items():
        if len(curve) != len(kept[name]) or not len(curve):
            raise ValueError(
                f"{name}: {len(curve)} distortions for {len(kept[name])} numbers of weights."
            )
        if not all(math.isfinite(x) for x in curve):
            raise ValueError(f"{name}: distortions must be finite, but got {list(curve)}.")
    if unit < 1:
        raise ValueError(f"unit must be at least 1, but got {unit}.")
    cost = {n: [-(-k // unit) for k in ks] for n, ks in kept.items()}
    room = budget // unit
    if sum(min(ks) for ks in cost.values()) > room:
        raise ValueError(f"budget {budget} is below what the layers keep at least.")
    best = torch.zeros(room + 1, dtype=torch.float64)
    choices = []
    for name, curve in curves.items():
        after = torch.full_like(best, math.inf)
        choice = torch.zeros(room + 1, dtype=torch.int64)
        # Fewer weights first, so that ties keep them.
        for point in sorted(range(len(curve)), key=lambda d: cost[name][d]):
            price = cost[name][point]
            if price > room:
                continue
            found = torch.full_like(best, math.inf)
            found[price:] = best[: room + 1 - price] + curve[point]
            better = found < after
            after = torch.where(better, found, after)
            choice[better] = point
        best = after
        choices.append(choice)
    left, points = room, {}
    for name, choice in zip(reversed(list(curves)), reversed(choices), strict=True):
        points[name] = int(choice[left])
        left -= cost[name][points[name]]
    return {name: points[name] for name in curves}


def _check_budget(budget: int, most: int) -> None:
    if not 0 <= budget <= most:
        raise ValueError(f"budget must lie in 0 ... {most}, but got {budget}.")
