"""Training a companded network: parameter groups, penalties, and ranges of learned values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bilevel.compander import companders, some

__all__ = ["confine", "hyperparameters", "parameter_groups", "squared_norm"]


def hyperparameters(model: nn.Module) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return log a and log b of each compander, for an optimizer or an outer level of your own."""
    return {name: (each.log_a, each.log_b) for name, each in companders(model).items()}


@torch.no_grad()
def confine(
    pairs: Iterable[tuple[Tensor, Tensor]],
    amplitude: tuple[float, float] = (0.25, math.inf),
    gamma: tuple[float, float] = (0.25, 8.0),
) -> None:
    """Project learned a and b into ranges, in place: call it after each step.

    b → 0 makes ψ a sign without a gradient, and nothing in a training loss prevents that.

    Args:
        pairs: log a and log b in units, such as ``hyperparameters(model).values()``.
        amplitude: least and largest a, in units.
        gamma: least and largest a/b.
    """
    for log_a, log_b in pairs:
        log_a.clamp_(*map(math.log, amplitude))
        log_b.clamp_(log_a - math.log(gamma[1]), log_a - math.log(gamma[0]))


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, hyper_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return groups for a `torch.optim` optimizer, with decay where it belongs.

    Args:
        model: with companders, or without.
        lr: learning rate of weights and biases.
        weight_decay: of v and of other weights of two or more dimensions; vectors (biases,
            norms), and learned a and b never decay.
        hyper_lr: learning rate of learned a and b; None for `lr`.
    """
    logs = {id(log) for pair in hyperparameters(model).values() for log in pair}
    hyper = [p for p in model.parameters() if id(p) in logs]
    rest = [p for p in model.parameters() if id(p) not in logs]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "lr": lr, "weight_decay": 0.0},
        {"params": hyper, "lr": lr if hyper_lr is None else hyper_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def squared_norm(model: nn.Module, of: Literal["latent", "effective"] = "latent") -> Tensor:
    """Return Σ v², or Σ w², over the companded weights; differentiable.

    Raises:
        ValueError: an unknown name, or the model has no compander.
    """
    if of not in ("latent", "effective"):
        raise ValueError(f"of must be 'latent' or 'effective', but got {of!r}.")
    squares = []
    for name in some(model, "penalize"):
        module = cast(nn.Linear, model.get_submodule(name))
        v = cast(Any, module.parametrizations).weight.original
        squares.append((v if of == "latent" else module.weight).square().sum())
    return torch.stack(squares).sum()
