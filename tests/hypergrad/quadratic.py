"""A nested quadratic whose penalized versions have closed forms too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypergrad import Problem

_G = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_G, dtype=torch.float64)


def _spd(n: int) -> Tensor:
    """A symmetric matrix with eigenvalues in [1, 2]."""
    q, _ = torch.linalg.qr(_normal(n, n))
    return q @ torch.diag(torch.linspace(1, 2, n).double()) @ q.T


A, C = _spd(4), _spd(4)
B, OFFSET, TARGET = 0.5 * _normal(4, 3), _normal(4), _normal(4)
RHO = 1.0
H = _normal(3)


def _inner(params: Any, hparams: Any, batch: Any) -> Tensor:
    w = params["w"]
    return 0.5 * w @ A @ w - (B @ hparams["h"] + OFFSET) @ w


def _outer(params: Any, hparams: Any, batch: Any) -> Tensor:
    d, h = params["w"] - TARGET, hparams["h"]
    return 0.5 * d @ C @ d + 0.5 * RHO * h @ h


PROBLEM = Problem(_inner, _outer)
"""f = wᵀAw/2 − (Bh + b)ᵀw,  F = (w − t)ᵀC(w − t)/2 + ρ‖h‖²/2."""


def solution(h: Tensor) -> Tensor:
    """w*(h) = A⁻¹(Bh + b)."""
    return torch.linalg.solve(A, B @ h + OFFSET)


def hypergradient(h: Tensor) -> Tensor:
    """ρh + BᵀA⁻¹C(w* − t)."""
    return RHO * h + B.T @ torch.linalg.solve(A, C @ (solution(h) - TARGET))


def penalized(h: Tensor, multiplier: float) -> Tensor:
    """y = argmin_w F + λf."""
    return torch.linalg.solve(C + multiplier * A, C @ TARGET + multiplier * (B @ h + OFFSET))


def optimum() -> Tensor:
    """h* where the hypergradient, linear in h, vanishes."""
    return _root(hypergradient)


def penalized_optimum(multiplier: float) -> Tensor:
    """argmin_h min_w F + λ(f − min f): the root of ρh − λBᵀ(y − w*)."""
    return _root(lambda h: RHO * h - multiplier * B.T @ (penalized(h, multiplier) - solution(h)))


def _root(function: Any) -> Tensor:
    """The root of an affine function of h."""
    zero = torch.zeros(3, dtype=torch.float64)
    offset = function(zero)
    columns = [function(e) - offset for e in torch.eye(3, dtype=torch.float64)]
    return torch.linalg.solve(torch.stack(columns, 1), -offset)


def start(w: Tensor | None = None) -> dict[str, Tensor]:
    """Params at w, or at zero."""
    w = torch.zeros(4, dtype=torch.float64) if w is None else w
    return {"w": w.detach().clone().requires_grad_()}


def at(h: Tensor) -> dict[str, Tensor]:
    """The hyperparameters h."""
    return {"h": h.detach().clone().requires_grad_()}
