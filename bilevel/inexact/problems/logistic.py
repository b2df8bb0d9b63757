"""Multinomial logistic regression with one L2 weight for each weight, class, or for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bilevel.domains import Grad
from bilevel.inexact.constants import Smoothness
from bilevel.inexact.samples import SmoothInner
from bilevel.space import Space
from hypergrad import Problem

__all__ = ["logistic_ridge"]

Data = tuple[Tensor, Tensor]
"""Features (N, p) and integer labels (N,)."""


def logistic_ridge(
    train: Data,
    val: Data,
    test: Data | None = None,
    *,
    classes: int | None = None,
    init: float = -3.0,
    shape: tuple[int, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> SmoothInner:
    """Return ridge-penalized multinomial logistic regression, tuned on validation cross-entropy.

        h(W, θ) = CE(XW, y) + ½ Σ e^θ W²,    g(W) = CE(X_v W, y_v),   means over rows.

    Constants with N rows and spectral norms: μ = min e^θ, L = ½‖X‖²/N + max e^θ,
    L_g = ½‖X_v‖²/N_v, L_J = max e^θ, ‖J‖ = max over entries of θ of e^θ ‖w‖ with w the weights
    that share it, and L_H = max‖xᵢ‖ ‖X‖²/(√2 N): along u and v the third derivative of the
    log-sum-exp is at most range(v) Var(u) ≤ √2 ‖v‖ · ½‖u‖².

    Args:
        train: of the inner loss.
        val: of the outer loss.
        test: of the test split.
        classes: number of classes k; by default the largest label plus one.
        init: initial θ, a logarithm.
        shape: of θ, to broadcast against W (p, k); by default (p, k), one for each weight.
        low: bound on θ: without one, a weight can lose its penalty, and κ explodes.
        high: bound on θ.

    Raises:
        ValueError: labels that are no integers from 0; a shape that does not broadcast.
    """
    for name, (_, y) in (("train", train), ("val", val)):
        if y.is_floating_point() or int(y.min()) < 0:
            raise ValueError(f"{name}: labels must be integers from 0, but got dtype {y.dtype}.")
    p, k = train[0].shape[1], classes or int(max(train[1].max(), val[1].max())) + 1
    shape = (p, k) if shape is None else shape
    if shape not in {(), (k,), (1, k), (p, 1), (p, k)}:
        raise ValueError(
            f"shape={shape} must be (), {(k,)}, {(1, k)}, {(p, 1)} or {(p, k)}, to broadcast "
            f"against W of shape {(p, k)}."
        )

    def error_of(params: Any, hparams: Any, batch: Data) -> Tensor:
        return F.cross_entropy(batch[0] @ params["W"], batch[1])

    def penalized(params: Any, hparams: Any, batch: Data) -> Tensor:
        penalty: Tensor = hparams["theta"].exp() * params["W"].square()
        return error_of(params, hparams, batch) + 0.5 * penalty.sum()

    squares, lengths = [], []
    for x, _ in (train, val):
        squares.append(float(torch.linalg.matrix_norm(x.double(), 2)) ** 2 / len(x))
        lengths.append(float(x.double().norm(dim=1).max()))

    def jacobian(hparams: Mapping[str, Tensor], params: Any) -> float:
        theta = hparams["theta"]
        squared = params["W"].detach().square().sum_to_size(theta.shape or (1, 1))
        return float((theta.exp() * squared.sqrt().reshape(theta.shape)).max())

    smoothness = Smoothness(
        mu=lambda h, w: float(h["theta"].exp().min()),
        L=lambda h, w: 0.5 * squares[0] + float(h["theta"].exp().max()),
        L_g=0.5 * squares[1],
        L_J=lambda h, w: float(h["theta"].exp().max()),
        L_H=lengths[0] * squares[0] / math.sqrt(2),
        jacobian=jacobian,
        g_convex=True,
    )
    weights = torch.zeros(p, k, dtype=train[0].dtype, requires_grad=True)
    return SmoothInner(
        Problem(penalized, error_of),
        {"W": weights},
        smoothness,
        space=Space(theta=Grad(init, low=low, high=high, shape=shape)),
        inner_batch=train,
        outer_batch=val,
        test_batch=test,
    )
