"""RMSprop, plain and centered, with momentum, and its adjoint in closed form."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hypergrad.optimizers.base import Bars, Optimizer, State, ValueBars
from hypergrad.optimizers.flat import axpy, cast, scale
from hypergrad.optimizers.moments import (
    add_quotient,
    average_of_squares,
    plus,
    root_bar,
    safe_sqrt,
)
from hypergrad.optimizers.values import Value, Values, is_zero

__all__ = ["RMSprop"]


class _Moments(NamedTuple):
    """What a step computes before it moves."""

    g: Tensor
    v: Tensor
    mean: Tensor | None
    root: Tensor
    denominator: Tensor


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """`torch.optim.RMSprop`, the same numbers bit for bit in float32 and float64:

        g ← ∇f(w) + λw,   v ← αv + (1 − α)g²,   D = √v + ε
        w ← w − ηg/D,   or with momentum   b ← μb + g/D,   w ← w − ηb

    and, centered, a ← αa + (1 − α)g, D = √(v − a²) + ε.  Every number may be tuned; see
    `Optimizer`.  The root has derivative 0 where it is 0.

    Source: Tieleman and Hinton, lecture 6.5 of Neural networks for machine learning, 2012;
    Graves, arXiv:1308.0850, equations 38–45 (centered).

    Attributes:
        lr: learning rate η ≥ 0.
        alpha: decay rate α in [0, 1).
        eps: ε ≥ 0, added to the root.
        weight_decay: λ ≥ 0, added to the gradient.
        momentum: μ ≥ 0.  The number 0 keeps no buffer; a tuned μ keeps one at any value.
        centered: divide by the standard deviation instead of the root mean square.
        maximize: ascend instead of descend.
    """

    lr: Value = 1e-2
    alpha: Value = 0.99
    eps: Value = 1e-8
    weight_decay: Value = 0.0
    momentum: Value = 0.0
    centered: bool = False
    maximize: bool = False

    ranges: ClassVar = {
        "lr": (0.0, torch.inf),
        "alpha": (0.0, 1.0),
        "eps": (0.0, torch.inf),
        "weight_decay": (0.0, torch.inf),
        "momentum": (0.0, torch.inf),
    }

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """η, α, ε, λ and μ."""
        return {
            "lr": self.lr,
            "alpha": self.alpha,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
        }

    @property
    def _has_buffer(self) -> bool:
        return not is_zero(self.momentum)

    def init(self, flat: Tensor) -> State:
        """Zero averages, and a zero buffer with momentum."""
        state: State = {"square_avg": torch.zeros_like(flat)}
        if self.centered:
            state["grad_avg"] = torch.zeros_like(flat)
        if self._has_buffer:
            state["momentum_buffer"] = torch.zeros_like(flat)
        return state

    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """See the formulas of the class."""
        now = self._moments(flat, grad, state, values)
        after: State = {"square_avg": now.v}
        if now.mean is not None:
            after["grad_avg"] = now.mean
        if not self._has_buffer:
            return add_quotient(flat, -values["lr"], now.g, now.denominator), after
        buffer = after["momentum_buffer"] = self._buffer(now, state, values)
        return axpy(flat, -values["lr"], buffer), after

    def _moments(self, flat: Tensor, grad: Tensor, state: State, values: Values) -> _Moments:
        alpha, decay = values["alpha"], values["weight_decay"]
        g = -grad if self.maximize else grad
        if not is_zero(decay):
            g = axpy(g, decay, flat)
        square = v = average_of_squares(state["square_avg"], g, alpha)
        mean = None
        if self.centered:
            mean = torch.lerp(state["grad_avg"], g, cast(1 - alpha, g))
            square = torch.addcmul(v, mean, mean, value=-1)
        root = safe_sqrt(square)
        return _Moments(g, v, mean, root, root + cast(values["eps"], root))

    def _buffer(self, now: _Moments, state: State, values: Values) -> Tensor:
        decayed = scale(state["momentum_buffer"], values["momentum"])
        return torch.addcdiv(decayed, now.g, now.denominator)

    def adjoint(
        self,
        flat: Tensor,
        grad: Tensor,
        state: State,
        values: Values,
        out_bar: Tensor,
        state_bar: Bars,
        wanted: Collection[str],
    ) -> tuple[Tensor, Tensor, Bars, Bars]:
        """The derivative of `update` by hand, no graph."""
        lr, alpha, _, decay, momentum = (values[k] for k in self.hyperparameters)
        now = self._moments(flat, grad, state, values)
        bars = ValueBars(values, wanted)
        before: Bars = {}

        # w ← w − ηb,  b = μb₀ + q,  q = g/D; without momentum b = q
        q = now.g / now.denominator
        q_bar = scale(out_bar, -lr)
        if not self._has_buffer:
            bars.add("lr", out_bar, q, -1.0)
        else:
            if "lr" in bars:
                bars.add("lr", out_bar, self._buffer(now, state, values), -1.0)
            q_bar = plus(q_bar, state_bar.get("momentum_buffer"))
            bars.add("momentum", q_bar, state["momentum_buffer"])
            before["momentum_buffer"] = scale(q_bar, momentum)
        g_bar = q_bar / now.denominator

        # D = √(v − a²) + ε
        denominator_bar = -g_bar * q
        bars.add("eps", denominator_bar, 1.0)
        square_bar = root_bar(denominator_bar, now.root)
        v_bar = plus(square_bar, state_bar.get("square_avg"))

        # v = αv₀ + (1 − α)g²,  a = αa₀ + (1 − α)g
        before["square_avg"] = scale(v_bar, alpha)
        g_bar = g_bar + scale(v_bar, 2 * (1 - alpha)) * now.g
        if "alpha" in bars:
            bars.add("alpha", v_bar, state["square_avg"] - now.g**2)
        if now.mean is not None:
            mean_bar = plus(-2 * square_bar * now.mean, state_bar.get("grad_avg"))
            before["grad_avg"] = scale(mean_bar, alpha)
            g_bar = g_bar + scale(mean_bar, 1 - alpha)
            if "alpha" in bars:
                bars.add("alpha", mean_bar, state["grad_avg"] - now.g)

        bars.add("weight_decay", g_bar, flat)
        flat_bar = out_bar if is_zero(decay) else axpy(out_bar, decay, g_bar)
        return flat_bar, -g_bar if self.maximize else g_bar, before, bars.bars
