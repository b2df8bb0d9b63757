"""Small nested problems with everything in closed form, for the tests of inexact methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import Grad, Space
from bilevel.inexact import SmoothInner, Tools, logistic_ridge, quadratic, tv_denoising
from bilevel.inexact.charts import Chart
from bilevel.inexact.level import Level
from bilevel.inexact.solvers import FISTA

DOUBLE = torch.float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@dataclass
class Least:
    """`quadratic` with its x̂, f, ∇f and θ*; κ(A₂ᵀA₂) is `kappa`."""

    n: int = 6
    d: int = 4
    seed: int = 0
    kappa: float = 10.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        n, d, s = self.n, self.d, 10 * self.seed
        rows = 2 * n
        left, right = torch.linalg.qr(normal(s, rows, n)).Q, torch.linalg.qr(normal(s + 1, n, n)).Q
        self.A2 = left @ torch.linspace(1.0, self.kappa**0.5, n, dtype=DOUBLE).diag() @ right
        self.A3, self.b2 = normal(s + 2, rows, d), normal(s + 3, rows)
        self.A1, self.b1 = self.scale**0.5 * normal(s + 4, rows, n), normal(s + 5, rows)
        self.b1 = self.scale**0.5 * self.b1
        self.H, self.J = self.A2.T @ self.A2, self.A2.T @ self.A3

    def inner(self, space: Space | None = None, x: Tensor | None = None) -> SmoothInner:
        A1, b1, A2, A3, b2 = self.A1, self.b1, self.A2, self.A3, self.b2
        return quadratic(A1, b1, A2, A3, b2, space=space, x=x)

    def x_hat(self, theta: Tensor) -> Tensor:
        return torch.linalg.solve(self.H, self.A2.T @ (self.b2 - self.A3 @ theta))

    def f(self, theta: Tensor) -> float:
        return float(0.5 * (self.A1 @ self.x_hat(theta) - self.b1).square().sum())

    def slope(self, theta: Tensor) -> Tensor:
        inner = self.A1.T @ (self.A1 @ self.x_hat(theta) - self.b1)
        return -self.J.T @ torch.linalg.solve(self.H, inner)

    @property
    def best(self) -> Tensor:
        """θ* = (MᵀM)⁻¹Mᵀ(A₁H⁻¹A₂ᵀb₂ - b₁),  M = A₁H⁻¹J."""
        M = self.A1 @ torch.linalg.solve(self.H, self.J)
        rest = self.A1 @ torch.linalg.solve(self.H, self.A2.T @ self.b2) - self.b1
        return torch.linalg.lstsq(M, rest[:, None]).solution[:, 0]


def softmax(seed: int = 0, **options: Any) -> SmoothInner:
    """Multinomial logistic ridge with 18 log-weights: 6 features, 3 classes."""
    x, truth = normal(seed, 60, 6), normal(seed + 1, 6, 3)
    y = (x @ truth + normal(seed + 2, 60, 3)).argmax(1)
    options = {"init": -1.0, "classes": 3, **options}
    return logistic_ridge((x[:30], y[:30]), (x[30:], y[30:]), **options)


def images(count: int = 2, size: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Piecewise constant images and noise of standard deviation 0.1."""
    clean = torch.zeros(count, size, size, dtype=DOUBLE)
    for i in range(count):
        clean[i, 2 + i :, 1:5] = 0.8 - 0.3 * i
    return {"clean": clean, "noisy": clean + 0.1 * normal(seed, count, size, size)}


def variation(**options: Any) -> SmoothInner:
    """TV denoising of two 8×8 images."""
    return tv_denoising(images(), **{"init": (-2.0, -2.0), **options})


def tools_of(inner: SmoothInner, cap: int = 100_000) -> Tools:
    """The parts of one outer step."""
    chart = Chart.of(inner.space, "unconstrained", inner.hparams)
    (batch,) = inner.inner_batches(1)
    level = Level(inner, chart, batch, inner.outer_batch())
    return Tools(level, FISTA(), inner.smoothness, cap, cap)


def box(low: float, high: float, size: int) -> Space:
    """A bounded θ for `quadratic`."""
    return Space(theta=Grad(0.5 * (low + high), low=low, high=high, shape=(size,)))
