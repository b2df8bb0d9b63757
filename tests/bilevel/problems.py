"""Nested problems with known optimal hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel import Grad, Space
from hypergrad import Problem

__all__ = ["RIDGE", "optimal_penalty", "ridge_options", "validation_loss"]

_G = torch.Generator().manual_seed(0)
_TRUTH = torch.randn(8, generator=_G, dtype=torch.float64)


def _rows(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 8, generator=_G, dtype=torch.float64)
    return x, x @ _TRUTH + 3.0 * torch.randn(count, generator=_G, dtype=torch.float64)


TRAIN, VAL, TEST = _rows(12), _rows(200), _rows(100)


def _error(params: Any, hparams: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (x @ params["w"] - y).square().mean()


def _penalized(params: Any, hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
    return _error(params, hparams, batch) + (hparams["penalty"] * params["w"].square()).sum()


RIDGE = Problem(_penalized, _error)


def ridge_options(shape: tuple[int, ...] = (), **changes: Any) -> dict[str, Any]:
    """Arguments of `tune` for ridge regression with one penalty, or one for each weight."""
    penalty = Grad(1.0, low=1e-4, high=10.0, scale="log", shape=shape)
    return {
        "params": {"w": torch.zeros(8, dtype=torch.float64, requires_grad=True)},
        "space": Space(penalty=penalty),
        "inner_batch": TRAIN,
        "outer_batch": VAL,
        "test_batch": TEST,
        **changes,
    }


def _solution(penalty: Tensor) -> Tensor:
    x, y = TRAIN
    return torch.linalg.solve(x.T @ x / len(x) + penalty * torch.eye(8).double(), x.T @ y / len(x))


def validation_loss(penalty: float | Tensor) -> float:
    """F(w*(h)) in closed form."""
    w = _solution(torch.as_tensor(penalty, dtype=torch.float64))
    return float(_error({"w": w}, {}, VAL))


def optimal_penalty() -> float:
    """argmin_h F(w*(h)) by golden section on log h."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda z: validation_loss(float(torch.tensor(z).exp())),
        bounds=(-9.0, 6.0),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return float(torch.tensor(found.x, dtype=torch.float64).exp())
