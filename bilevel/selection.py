"""Selections of modules: which of a network's modules are worth adapting.

Scores of modules stand in a matrix, one row for each layer.  What turns them into a selection, and
reads one, is here; what makes scores is `bilevel.diffora`, or anything else: norms, ablations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "Gated",
    "Relaxation",
    "Scope",
    "Selection",
    "discretize",
    "gates",
    "in_order",
    "layer_rows",
    "of_modules",
    "stability",
]

Relaxation = Literal["softmax", "sigmoid"]
Scope = Literal["row", "global", "budget"]
T = TypeVar("T")


class Gated(Protocol):
    """Anything that can be switched: 1 on, 0 off, and differentiable between."""

    gate: float | Tensor


def layer_rows(names: Sequence[str]) -> list[list[str]]:
    """Return names of modules as rows of a matrix, one row for each layer.

    The layer is what stands before the last dot after the first number: "blocks.0.q" and
    "blocks.0.mlp.up" are of layer "blocks.0".  Where names have no such form, or layers do not
    have equally many of at least two modules, all modules make one row.

    Raises:
        ValueError: no name.
    """
    if not names:
        raise ValueError("there are no candidate modules: names is empty.")
    layers: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
        layers.setdefault(".".join(parts[: numbers[0] + 1]) if numbers else "", []).append(name)
    rows = list(layers.values())
    equal = len({len(row) for row in rows}) == 1
    return rows if equal and len(rows[0]) > 1 else [list(names)]


def in_order(modules: Mapping[str, Gated], rows: Sequence[Sequence[str]]) -> list[Gated]:
    """Return the modules in the order of the matrix.

    Raises:
        ValueError: no module, rows of different lengths, an unknown or repeated name.
        TypeError: a module without a gate.
    """
    if not modules:
        raise ValueError(
            "there are no candidate modules: modules is empty. Put weight maps on the model first "
            "(adapters.reparam.attach)."
        )
    if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(
            f"rows must be of one length of at least 1, but have {[len(r) for r in rows]}."
        )
    flat = [name for row in rows for name in row]
    unknown = [name for name in flat if name not in modules]
    if unknown or len(set(flat)) != len(flat):
        raise ValueError(
            f"rows must name each module once; unknown: {unknown}, known: {', '.join(modules)}."
        )
    closed = [name for name in flat if not hasattr(modules[name], "gate")]
    if closed:
        raise TypeError(f"modules must have a gate, but {', '.join(closed)} have none.")
    return [modules[name] for name in flat]


def gates(logits: Tensor, relaxation: Relaxation = "softmax") -> Tensor:
    """Return G of α, shape (layers, modules): rows that sum to one, or independent sigmoids.

    Raises:
        ValueError: α is no matrix, or an unknown relaxation.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must be a matrix, but have shape {tuple(logits.shape)}.")
    if relaxation not in ("softmax", "sigmoid"):
        raise ValueError(f"relaxation must be 'softmax' or 'sigmoid', but got {relaxation!r}.")
    return torch.softmax(logits, dim=1) if relaxation == "softmax" else torch.sigmoid(logits)


def discretize(
    scores: Tensor, share: float, scope: Scope = "row", sizes: Tensor | None = None
) -> Tensor:
    """Return a mask of the best share of the modules; ties go to the lower layer and module.

    Args:
        scores: α or other scores, shape (layers, modules).
        share: ρ in (0, 1].
        scope: "row" keeps K = max(1, ⌊ρ N⌋) of the N modules of every layer; "global" keeps
            max(1, ⌊ρ L N⌋) of all and may leave a layer empty (it ranks the scores as they are:
            α and not the gates); "budget" goes through all by score and keeps each that
            still fits into the share ρ of the parameters, the smallest if none does.
        sizes: parameters that each module's adapter has, shape of the scores; for "budget".

    Raises:
        ValueError: ρ outside (0, 1], NaN scores, an unknown scope, or sizes that are missing, of
            another shape, or not positive.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], but got {share}.")
    if scores.dim() != 2 or not scores.numel() or scores.isnan().any():
        raise ValueError(
            f"scores must be a matrix without NaN, shape (layers, modules), but got {scores}."
        )
    if scope not in ("row", "global", "budget"):
        raise ValueError(f"scope must be 'row', 'global' or 'budget', but got {scope!r}.")
    if scope == "budget":
        return _fitting(scores.detach(), share, sizes)
    rows = scores.detach() if scope == "row" else scores.detach().reshape(1, -1)
    count = max(1, math.floor(share * rows.shape[1] + 1e-9))
    mask = torch.zeros_like(rows, dtype=torch.bool)
    mask.scatter_(1, rows.argsort(dim=1, descending=True, stable=True)[:, :count], True)
    return mask.view(scores.shape)


def _fitting(scores: Tensor, share: float, sizes: Tensor | None) -> Tensor:
    if sizes is None or sizes.shape != scores.shape or not (sizes > 0).all():
        raise ValueError(
            f"scope 'budget' needs positive sizes of shape {tuple(scores.shape)}, but got {sizes}."
        )
    flat = sizes.flatten()
    left = share * float(flat.sum()) + 1e-9
    mask = torch.zeros_like(flat, dtype=torch.bool)
    for i in scores.flatten().argsort(descending=True, stable=True).tolist():
        if float(flat[i]) <= left:
            mask[i] = True
            left -= float(flat[i])
    if not mask.any():
        mask[int(flat.argmin())] = True
    return mask.view(scores.shape)


def stability(masks: Sequence[Tensor]) -> float:
    """Return the mean Jaccard index of pairs of selections; below .4 they are mostly noise.

    Raises:
        ValueError: fewer than two selections.
    """
    if len(masks) < 2:
        raise ValueError(f"stability compares at least two selections, but got {len(masks)}.")
    found = [
        float((a & b).sum() / (a | b).sum().clamp(min=1))
        for a, b in itertools.combinations(masks, 2)
    ]
    return sum(found) / len(found)


def of_modules(named: Mapping[str, T], modules: Collection[str]) -> dict[str, T]:
    """Return those entries whose names lie below some modules, such as "0.weight" below "0"."""
    return {
        name: value
        for name, value in named.items()
        if any(name.startswith(f"{module}.") for module in modules)
    }


@dataclass(frozen=True)
class Selection:
    """What a search found.

    Attributes:
        logits: α, shape (layers, modules); for the score selector the accumulated scores.
        mask: the kept modules, booleans of that shape.
        names: of the kept modules, in the order of the matrix.
        history: α after each step of it, shape (steps, layers, modules).
    """

    logits: Tensor
    mask: Tensor
    names: list[str]
    history: Tensor

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the trained parameters of the kept modules by name.

        This is what an average, a penalty or an optimizer over the chosen modules alone takes.

        Raises:
            ValueError: nothing below the kept modules requires grad.
        """
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found = of_modules(trained, self.names)
        if not found:
            raise ValueError(
                f"no parameter of {', '.join(self.names)} requires grad; trained are "
                f"{', '.join(trained) or 'none'}."
            )
        return found
