"""Optimization under equality constraints: problems by formula, and logistic regression."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.tasks.task import Task
from bilevel.checks import did_you_mean, integer

__all__ = ["HOCK_SCHITTKOWSKI", "Constrained", "constrained_logistic", "hock_schittkowski"]

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Constrained(Task):
    """min_x f(x) subject to c(x) = 0, with m ≤ n smooth constraints.

    Every split holds one row: "x" is a start point, shape (1, n), "y" are start multipliers,
    shape (1, m).  The three splits are the same.

    Attributes:
        objective: f, ``x of shape (n,) -> scalar``, for `torch.func`.
        constraints: c, ``x of shape (n,) -> shape (m,)``.
        minimum: the known f(x*), or None.
    """

    objective: Function = field(kw_only=True)
    constraints: Function = field(kw_only=True)
    minimum: float | None = field(kw_only=True, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        x, y = self.splits["train"]["x"][0], self.splits["train"]["y"][0]
        found = tuple(self.constraints(x).shape)
        if found != tuple(y.shape) or len(y) > len(x):
            raise ValueError(
                f"constraints must return shape {tuple(y.shape)}, one number for each of at most "
                f"{len(x)} multipliers, but got {found}."
            )

    def measure(self, outputs: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return "loss" (f) and "violation" (‖c‖) of each point, shape (rows, n)."""
        return {
            "loss": torch.stack([self.objective(x) for x in outputs]),
            "violation": torch.stack([self.constraints(x).norm() for x in outputs]),
        }


def _stack(*values: Tensor) -> Tensor:
    return torch.stack(values)


_SQRT2 = math.sqrt(2.0)

HOCK_SCHITTKOWSKI: Mapping[int, tuple[list[float], float, Function, Function]] = {
    6: (
        [-1.2, 1.0],
        0.0,
        lambda x: (1 - x[0]) ** 2,
        lambda x: _stack(10 * (x[1] - x[0] ** 2)),
    ),
    7: (
        [2.0, 2.0],
        -math.sqrt(3.0),
        lambda x: torch.log(1 + x[0] ** 2) - x[1],
        lambda x: _stack((1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4),
    ),
    28: (
        [-4.0, 1.0, 1.0],
        0.0,
        lambda x: (x[0] + x[1]) ** 2 + (x[1] + x[2]) ** 2,
        lambda x: _stack(x[0] + 2 * x[1] + 3 * x[2] - 1),
    ),
    39: (
        [2.0, 2.0, 2.0, 2.0],
        -1.0,
        lambda x: -x[0],
        lambda x: _stack(x[1] - x[0] ** 3 - x[2] ** 2, x[0] ** 2 - x[1] - x[3] ** 2),
    ),
    40: (
        [0.8, 0.8, 0.8, 0.8],
        -0.25,
        lambda x: -x[0] * x[1] * x[2] * x[3],
        lambda x: _stack(x[0] ** 3 + x[1] ** 2 - 1, x[0] ** 2 * x[3] - x[2], x[3] ** 2 - x[1]),
    ),
    42: (
        [1.0, 1.0, 1.0, 1.0],
        28 - 10 * _SQRT2,
        lambda x: ((x - torch.arange(1, 5, dtype=x.dtype, device=x.device)) ** 2).sum(),
        lambda x: _stack(x[0] - 2, x[2] ** 2 + x[3] ** 2 - 2),
    ),
    48: (
        [3.0, 5.0, -3.0, 2.0, -2.0],
        0.0,
        lambda x: (x[0] - 1) ** 2 + (x[1] - x[2]) ** 2 + (x[3] - x[4]) ** 2,
        lambda x: _stack(x.sum() - 5, x[2] - 2 * (x[3] + x[4]) + 3),
    ),
    50: (
        [35.0, -31.0, 11.0, 5.0, -5.0],
        0.0,
        lambda x: (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 2 + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 2,
        lambda x: _stack(
            x[0] + 2 * x[1] + 3 * x[2] - 6,
            x[1] + 2 * x[2] + 3 * x[3] - 6,
            x[2] + 2 * x[3] + 3 * x[4] - 6,
        ),
    ),
    51: (
        [2.5, 0.5, 2.0, -1.0, 0.5],
        0.0,
        lambda x: (x[0] - x[1]) ** 2 + (x[1] + x[2] - 2) ** 2 + (x[3] - 1) ** 2 + (x[4] - 1) ** 2,
        lambda x: _stack(x[0] + 3 * x[1] - 4, x[2] + x[3] - 2 * x[4], x[1] - x[4]),
    ),
    52: (
        [2.0, 2.0, 2.0, 2.0, 2.0],
        1859 / 349,
        lambda x: (
            (4 * x[0] - x[1]) ** 2 + (x[1] + x[2] - 2) ** 2 + (x[3] - 1) ** 2 + (x[4] - 1) ** 2
        ),
        lambda x: _stack(x[0] + 3 * x[1], x[2] + x[3] - 2 * x[4], x[1] - x[4]),
    ),
    77: (
        [2.0, 2.0, 2.0, 2.0, 2.0],
        0.24150513,
        lambda x: (
            (x[0] - 1) ** 2
            + (x[0] - x[1]) ** 2
            + (x[2] - 1) ** 2
            + (x[3] - 1) ** 4
            + (x[4] - 1) ** 6
        ),
        lambda x: _stack(
            x[0] ** 2 * x[3] + torch.sin(x[3] - x[4]) - 2 * _SQRT2,
            x[1] + x[2] ** 4 * x[3] ** 2 - 8 - _SQRT2,
        ),
    ),
    78: (
        [-2.0, 1.5, 2.0, -1.0, -1.0],
        -2.91970041,
        lambda x: x.prod(),
        lambda x: _stack(
            (x**2).sum() - 10, x[1] * x[2] - 5 * x[3] * x[4], x[0] ** 3 + x[1] ** 3 + 1
        ),
    ),
    79: (
        [2.0, 2.0, 2.0, 2.0, 2.0],
        0.0787768209,
        lambda x: (
            (x[0] - 1) ** 2
            + (x[0] - x[1]) ** 2
            + (x[1] - x[2]) ** 2
            + (x[2] - x[3]) ** 4
            + (x[3] - x[4]) ** 4
        ),
        lambda x: _stack(
            x[0] + x[1] ** 2 + x[2] ** 3 - 2 - 3 * _SQRT2,
            x[1] - x[2] ** 2 + x[3] + 2 - 2 * _SQRT2,
            x[0] * x[4] - 2,
        ),
    ),
}
"""Number -> start point, f(x*), f and c of problems with equality constraints only.

Hock and Schittkowski, "Test Examples for Nonlinear Programming Codes", 1981.
"""


def hock_schittkowski(number: int = 6) -> Constrained:
    """One of 13 textbook problems with equality constraints (Hock and Schittkowski 1981).

    Args:
        number: a key of `HOCK_SCHITTKOWSKI`.

    Raises:
        ValueError: another number.
    """
    if number not in HOCK_SCHITTKOWSKI:
        known = map(str, HOCK_SCHITTKOWSKI)
        raise ValueError(f"unknown problem number {number!r}; {did_you_mean(number, known)}")
    start, minimum, objective, constraints = HOCK_SCHITTKOWSKI[number]
    x = torch.tensor([start], dtype=torch.float64)
    row = {"x": x, "y": torch.zeros(1, len(constraints(x[0])), dtype=torch.float64)}
    return Constrained(
        "hock_schittkowski",
        {"train": row, "val": row, "test": row},
        {"number": number},
        objective=objective,
        constraints=constraints,
        minimum=minimum,
    )


def constrained_logistic(linear: int = 10, seed: int = 0) -> Constrained:
    """Logistic regression on breast cancer with random linear constraints A w = b and ‖w‖² = 1.

    Args:
        linear: rows of A; b is A w̄ at a random unit vector w̄, so that the constraints can be met.
        seed: decides A and w̄.

    Raises:
        TypeError: an argument that is not an integer.
        ValueError: more constraints than unknowns.
    """
    from sklearn.datasets import load_breast_cancer

    if not 0 <= integer("linear", linear) < 30:
        raise ValueError(f"linear must lie in 0 ... 29, fewer than the weights, but got {linear}.")
    data = load_breast_cancer()
    x = torch.from_numpy((data.data - data.data.mean(0)) / data.data.std(0))
    sign = torch.from_numpy(2.0 * data.target - 1.0)
    generator = np.random.default_rng(integer("seed", seed, minimum=0))
    A = torch.from_numpy(generator.standard_normal((linear, 30)))
    inside = torch.from_numpy(generator.standard_normal(30))
    b = A @ (inside / inside.norm())

    def objective(w: Tensor) -> Tensor:
        margins = sign.to(w) * (x.to(w) @ w)
        return torch.nn.functional.softplus(-margins).mean()

    def constraints(w: Tensor) -> Tensor:
        return torch.cat([A.to(w) @ w - b.to(w), (w.square().sum() - 1)[None]])

    start = torch.full((1, 30), 1 / math.sqrt(30), dtype=torch.float64)
    row = {"x": start, "y": torch.ones(1, linear + 1, dtype=torch.float64)}
    return Constrained(
        "constrained_logistic",
        {"train": row, "val": row, "test": row},
        {"linear": linear, "seed": seed},
        objective=objective,
        constraints=constraints,
    )
