"""Stochastic gradient descent with momentum, and its adjoint in closed form."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad.optimizers.base import Bars, Optimizer, State, ValueBars
from hypergrad.optimizers.flat import axpy, scale
from hypergrad.optimizers.values import Value, Values, is_zero

__all__ = ["SGD"]


@dataclass(frozen=True)
class SGD(Optimizer):
    """`torch.optim.SGD`, the same numbers bit for bit in float32 and float64:

        g ← ∇f(w) + λw,   b ← μb + (1 − τ)g  (b ← g at the first step),   w ← w − ηb

    and w ← w − η(g + μb) with Nesterov momentum.  Every number may be tuned; see `Optimizer`.

    Attributes:
        lr: learning rate η ≥ 0.
        momentum: μ ≥ 0.  The number 0 keeps no buffer; a tuned μ keeps one at any value.
        dampening: τ.
        weight_decay: λ ≥ 0.
        nesterov: look ahead along the momentum; needs momentum and no dampening.
        maximize: ascend instead of descend.
    """

    lr: Value = 1e-3
    momentum: Value = 0.0
    dampening: Value = 0.0
    weight_decay: Value = 0.0
    nesterov: bool = False
    maximize: bool = False

    ranges: ClassVar = {
        "lr": (0.0, torch.inf),
        "momentum": (0.0, torch.inf),
        "weight_decay": (0.0, torch.inf),
    }

    def __post_init__(self) -> None:
        if self.nesterov and not (self._has_buffer and is_zero(self.dampening)):
            raise ValueError(
                "SGD nesterov=True needs a momentum and zero dampening, but got "
                f"momentum={self.momentum!r}, dampening={self.dampening!r}."
            )

    @property
    def _has_buffer(self) -> bool:
        return not is_zero(self.momentum)

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """η, μ, τ and λ."""
        return {
            "lr": self.lr,
            "momentum": self.momentum,
            "dampening": self.dampening,
            "weight_decay": self.weight_decay,
        }

    def init(self, flat: Tensor) -> State:
        """No buffer yet: the first gradient fills it undampened."""
        return {"momentum_buffer": None}

    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """See the formulas of the class."""
        _, buffer, direction = self._direction(flat, grad, state, values)
        after = {"momentum_buffer": buffer if self._has_buffer else None}
        return axpy(flat, -values["lr"], direction), after

    def _direction(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the decayed gradient g, the new buffer b (g without momentum) and the descent."""
        g = -grad if self.maximize else grad
        if not is_zero(values["weight_decay"]):
            g = axpy(g, values["weight_decay"], flat)
        if not self._has_buffer:
            return g, g, g
        momentum, previous = values["momentum"], state["momentum_buffer"]
        buffer = g
        if previous is not None:
            buffer = axpy(scale(previous, momentum), 1 - values["dampening"], g)
        return g, buffer, axpy(g, momentum, buffer) if self.nesterov else buffer

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
        lr, momentum, dampening, decay = (values[k] for k in self.hyperparameters)
        previous = state["momentum_buffer"]
        bars = ValueBars(values, wanted)
        g = buffer = direction = grad
        if "lr" in bars or "momentum" in bars or "dampening" in bars:
            g, buffer, direction = self._direction(flat, grad, state, values)
            bars.add("lr", out_bar, direction, -1.0)

        before: Bars = {}
        if not self._has_buffer:
            g_bar = scale(out_bar, -lr)
        else:
            # b enters w by −η, by −ημ with Nesterov momentum, and the next step's b.
            rate = -lr * momentum if self.nesterov else -lr
            later = state_bar.get("momentum_buffer")
            buffer_bar = scale(out_bar, rate) if later is None else axpy(later, rate, out_bar)
            g_bar = buffer_bar
            if previous is not None:
                before["momentum_buffer"] = scale(buffer_bar, momentum)
                bars.add("momentum", buffer_bar, previous)
                bars.add("dampening", buffer_bar, g, -1.0)
                if not is_zero(dampening):
                    g_bar = scale(buffer_bar, 1 - dampening)
            if self.nesterov:
                bars.add("momentum", out_bar, buffer, -lr)
                g_bar = axpy(g_bar, -lr, out_bar)

        bars.add("weight_decay", g_bar, flat)
        flat_bar = out_bar if is_zero(decay) else axpy(out_bar, decay, g_bar)
        return flat_bar, -g_bar if self.maximize else g_bar, before, bars.bars
