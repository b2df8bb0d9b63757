"""Ridge regression with a known optimal penalty, conditioned so that few steps solve it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from bilevel import Grad, Space
from hypergrad import SGD, Problem

__all__ = ["RIDGE", "RULE", "optimal_penalty", "ridge_options", "solution", "validation_loss"]

_G = torch.Generator().manual_seed(1)
_TRUTH = torch.tensor([2.0, -1.5, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)


def _rows(count: int, noise: float) -> tuple[Tensor, Tensor]:
    """Rows whose second moment matrix has eigenvalues between 0.5 and 1."""
    directions = torch.linalg.qr(torch.randn(count, 8, generator=_G, dtype=torch.float64)).Q
    x = math.sqrt(count) * directions * torch.linspace(0.7, 1.0, 8, dtype=torch.float64)
    return x, x @ _TRUTH + noise * torch.randn(count, generator=_G, dtype=torch.float64)


TRAIN, VAL, TEST = _rows(16, 3.0), _rows(200, 1.0), _rows(100, 1.0)

RULE = SGD(lr=0.3, momentum=0.2)


def _error(params: Any, hparams: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (x @ params["w"] - y).square().mean()


def _penalized(params: Any, hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
    return _error(params, hparams, batch) + (hparams["penalty"] * params["w"].square()).sum()


RIDGE = Problem(_penalized, _error)


def ridge_options(shape: tuple[int, ...] = (), **changes: Any) -> dict[str, Any]:
    """Arguments of `tune` for ridge regression with one penalty, or one for each weight."""
    penalty = Grad(1.0, low=1e-3, high=3.0, scale="log", shape=shape)
    return {
        "params": {"w": torch.zeros(8, dtype=torch.float64, requires_grad=True)},
        "space": Space(penalty=penalty),
        "optimizer": RULE,
        "inner_batch": TRAIN,
        "outer_batch": VAL,
        "test_batch": TEST,
        **changes,
    }


def solution(penalty: float | Tensor) -> Tensor:
    """w*(h) = (XᵀX/n + diag h)⁻¹ Xᵀy/n."""
    x, y = TRAIN
    diagonal = torch.as_tensor(penalty, dtype=torch.float64).expand(8).diag()
    return torch.linalg.solve(x.T @ x / len(x) + diagonal, x.T @ y / len(x))


def validation_loss(penalty: float | Tensor) -> float:
    """F(w*(h)) in closed form."""
    return float(_error({"w": solution(penalty)}, {}, VAL))


def optimal_penalty() -> float:
    """argmin_h F(w*(h)), by a line search over log h."""
    found = minimize_scalar(
        lambda z: validation_loss(math.exp(z)),
        bounds=(math.log(1e-3), math.log(3.0)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return math.exp(found.x)
