"""Linear least squares below linear least squares: everything in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.inexact.constants import Smoothness
from bilevel.inexact.samples import SmoothInner
from bilevel.space import Space
from hypergrad import Problem

__all__ = ["quadratic"]


def quadratic(
    A1: Tensor,
    b1: Tensor,
    A2: Tensor,
    A3: Tensor,
    b2: Tensor,
    *,
    theta: Tensor | None = None,
    x: Tensor | None = None,
    space: Space | None = None,
) -> SmoothInner:
    """Return  min_θ ½‖A₁ x̂(θ) - b₁‖²,  x̂(θ) = argmin_x ½‖A₂ x + A₃ θ - b₂‖².

    Constants: μ and L are the extreme eigenvalues of A₂ᵀA₂, ‖J‖ = ‖A₂ᵀA₃‖, L_g = ‖A₁‖², and
    second derivatives are constant.

    Args:
        A1: shape (p, n).
        b1: shape (p,).
        A2: shape (q, n), of full column rank.
        A3: shape (q, d).
        b2: shape (q,).
        theta: initial θ (d,); that of the space by default, or ones.
        x: initial x (n,); zeros by default.
        space: domain of "theta"; unbounded by default.

    Raises:
        ValueError: A₂ is rank deficient, so that h is not strongly convex.
    """
    squares = torch.linalg.svdvals(A2).square()
    n, d = A2.shape[1], A3.shape[1]
    floor = len(A2) * torch.finfo(A2.dtype).eps * float(squares[0])
    if len(squares) < n or float(squares[-1]) <= floor:
        raise ValueError(
            f"A2 of shape {tuple(A2.shape)} must have rank {n}, or the inner loss is not strongly "
            f"convex, but its smallest squared singular value is {float(squares[-1]):.3g}."
        )

    def inner_loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        residual: Tensor = A2 @ params["x"] + A3 @ hparams["theta"] - b2
        return 0.5 * residual.square().sum()

    def outer_loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        residual: Tensor = A1 @ params["x"] - b1
        return 0.5 * residual.square().sum()

    smoothness = Smoothness(
        mu=float(squares[-1]),
        L=float(squares[0]),
        L_g=float(torch.linalg.matrix_norm(A1, 2)) ** 2,
        L_J=0.0,
        L_H=0.0,
        jacobian=float(torch.linalg.matrix_norm(A2.T @ A3, 2)),
        g_convex=True,
    )
    start = torch.zeros(n, dtype=A2.dtype) if x is None else x.detach().clone()
    if theta is None and space is None:
        theta = torch.ones(d, dtype=A2.dtype)
    return SmoothInner(
        Problem(inner_loss, outer_loss),
        {"x": start.requires_grad_()},
        smoothness,
        hparams=None if theta is None else {"theta": theta.detach().clone()},
        space=space,
    )
