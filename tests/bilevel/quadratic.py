"""A stochastic quadratic bilevel problem with its solution in closed form, and instrumented losses.

    f(w, h) = mean over i of  ½ wᵀHᵢw - wᵀ(Bᵢh + cᵢ)
    F(w, h) = mean over j of  ½ ‖w - tⱼ‖² + ½ α ‖h - sⱼ‖²

With H, B, c, t, s the averages, w*(h) = H⁻¹(Bh + c) and dF/dh = α (h - s) + BᵀH⁻¹(w*(h) - t).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel import Grad, Space
from bilevel.single_loop import FiniteSum
from hypergrad import Problem

DIM = 4
START = 0.5


class _Counted(torch.autograd.Function):
    """The identity, which counts how often its derivative is differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counter: list[int]) -> Tensor:
        ctx.counter = counter
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _CountedBackward.apply(grad, ctx.counter), None


class _CountedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, counter: list[int]) -> Tensor:
        ctx.counter = counter
        return grad.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.counter[0] += 1
        return grad, None


@dataclass
class Quadratic:
    """The problem; `noise` is the spread of its batches.

    With `attainable`, α = 0 and B is invertible, so that w*(h) = t at the optimum: there ∇_w F = 0
    and the adjoint vanishes, and so does the noise of a randomized Neumann series.
    """

    batches: int = 1
    noise: float = 0.0
    attainable: bool = False
    bound: float | None = None
    loss_calls: list[int] = field(default_factory=lambda: [0])
    double_backwards: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(7)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        basis = torch.linalg.qr(rand(DIM, DIM)).Q
        self.H = basis @ torch.diag(torch.tensor([0.6, 0.8, 1.0, 1.2]).double()) @ basis.T
        self.B, self.c = torch.linalg.qr(rand(DIM, DIM)).Q, rand(DIM)
        self.t, self.s = rand(DIM), rand(DIM)
        self.alpha = 0.0 if self.attainable else 0.5

        def spread(center: Tensor, count: int) -> list[Tensor]:
            noise = rand(count, *center.shape)
            noise = noise - noise.mean(0)
            return list(center + self.noise * noise)

        n = self.batches
        half = spread(torch.zeros(DIM, DIM).double(), n)
        rows = zip(half, spread(self.B, n), spread(self.c, n), strict=True)
        self.inner_batches = [{"H": self.H + 0.1 * (a + a.T), "B": b, "c": c} for a, b, c in rows]
        m = max(1, n - 2)
        self.outer_batches = [
            {"t": t, "s": s} for t, s in zip(spread(self.t, m), spread(self.s, m), strict=True)
        ]

    def _inner_loss(self, params: Any, hparams: Any, batch: Any) -> Tensor:
        self.loss_calls[0] += 1
        w = torch.cat([_Counted.apply(params["a"], self.double_backwards), params["b"].flatten()])
        return 0.5 * w @ batch["H"] @ w - w @ (batch["B"] @ hparams["h"] + batch["c"])

    def _outer_loss(self, params: Any, hparams: Any, batch: Any) -> Tensor:
        self.loss_calls[0] += 1
        w = torch.cat([params["a"], params["b"].flatten()])
        direct = self.alpha * (hparams["h"] - batch["s"]).square().sum()
        return 0.5 * (w - batch["t"]).square().sum() + 0.5 * direct

    def inner(self, seed: int = 0) -> FiniteSum:
        """Return the inner level; weights in two tensors of different shapes."""
        bound = self.bound
        low = None if bound is None else -bound
        return FiniteSum(
            Problem(self._inner_loss, self._outer_loss),
            {
                "a": torch.zeros(1, dtype=torch.float64, requires_grad=True),
                "b": torch.zeros(3, 1, dtype=torch.float64, requires_grad=True),
            },
            self.inner_batches,
            self.outer_batches,
            space=Space(h=Grad(START, low=low, high=bound, shape=(DIM,))),
            seed=seed,
        )

    @property
    def best(self) -> Tensor:
        """h* in closed form."""
        K = self.B.T @ torch.linalg.inv(self.H)
        system = self.alpha * torch.eye(DIM).double() + K @ K.T
        rest = torch.linalg.solve(self.H, self.c) - self.t
        return torch.linalg.solve(system, self.alpha * self.s - K @ rest)

    def weights(self, h: Tensor) -> Tensor:
        """w*(h)."""
        return torch.linalg.solve(self.H, self.B @ h + self.c)

    def adjoint(self, h: Tensor) -> Tensor:
        """v* = -H⁻¹ ∇_w F at w*(h)."""
        return -torch.linalg.solve(self.H, self.weights(h) - self.t)


def flat(params: Any) -> Tensor:
    """The weights as one vector."""
    return torch.cat([params["a"], params["b"].flatten()]).detach()


def run(algorithm: Any, inner: FiniteSum, steps: int) -> tuple[Any, list[Any]]:
    """Take outer steps; return the state and the reports."""
    state, reports = algorithm.init(inner), []
    for _ in range(steps):
        report, state = algorithm.step(inner, state)
        reports.append(report)
    return state, reports
