"""Adagrad, and its adjoint in closed form."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad.optimizers.base import Bars, Optimizer, State, ValueBars
from hypergrad.optimizers.flat import axpy, cast, scale
from hypergrad.optimizers.moments import add_quotient, plus, root_bar, safe_sqrt
from hypergrad.optimizers.values import Value, Values, is_zero

__all__ = ["Adagrad"]


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """`torch.optim.Adagrad`, the same numbers bit for bit in float32 and float64:

        g ← ∇f(w) + λw,   s ← s + g²  (s₀ = τ),   w ← w − η/(1 + (t − 1)κ) · g/(√s + ε)

    Every number may be tuned; see `Optimizer`.  √s has derivative 0 at s = 0.

    Source: Duchi, Hazan and Singer, JMLR 12, 2011.

    Attributes:
        lr: learning rate η ≥ 0.
        lr_decay: κ ≥ 0.
        weight_decay: λ ≥ 0, added to the gradient.
        initial_accumulator_value: τ ≥ 0.  It enters at the first step, so a call that continues
            from a later state has derivative 0 in it.
        eps: ε ≥ 0, added to the root.
        maximize: ascend instead of descend.
    """

    lr: Value = 1e-2
    lr_decay: Value = 0.0
    weight_decay: Value = 0.0
    initial_accumulator_value: Value = 0.0
    eps: Value = 1e-10
    maximize: bool = False

    ranges: ClassVar = {
        "lr": (0.0, torch.inf),
        "lr_decay": (0.0, torch.inf),
        "weight_decay": (0.0, torch.inf),
        "initial_accumulator_value": (0.0, torch.inf),
        "eps": (0.0, torch.inf),
    }

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """η, κ, λ, τ and ε."""
        return {
            "lr": self.lr,
            "lr_decay": self.lr_decay,
            "weight_decay": self.weight_decay,
            "initial_accumulator_value": self.initial_accumulator_value,
            "eps": self.eps,
        }

    def init(self, flat: Tensor) -> State:
        """No sum yet: the first step starts it at τ, which may be tuned."""
        return {"step": 0, "sum": None}

    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """See the formulas of the class."""
        g, total, _, denominator = self._moments(flat, grad, state, values)
        rate = -values["lr"] / self._slowing(state, values)
        after = {"step": state["step"] + 1, "sum": total}
        return add_quotient(flat, rate, g, denominator), after

    @staticmethod
    def _slowing(state: State, values: Values) -> float | Tensor:
        """1 + (t − 1)κ at step t; the state counts the steps before it."""
        taken: int = state["step"]
        return 1 + taken * values["lr_decay"]

    def _moments(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return g, s, √s and √s + ε."""
        g = -grad if self.maximize else grad
        if not is_zero(values["weight_decay"]):
            g = axpy(g, values["weight_decay"], flat)
        before = state["sum"]
        if before is None:
            before = torch.zeros_like(flat) + cast(values["initial_accumulator_value"], flat)
        total = torch.addcmul(before, g, g)
        root = safe_sqrt(total)
        return g, total, root, root + cast(values["eps"], root)

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
        lr, decay = values["lr"], values["weight_decay"]
        g, _, root, denominator = self._moments(flat, grad, state, values)
        slowing = self._slowing(state, values)
        bars = ValueBars(values, wanted)
        before: Bars = {}

        # w ← w − (η/c)q,  q = g/D,  c = 1 + (t − 1)κ
        q = g / denominator
        bars.add("lr", out_bar, q, -1 / slowing)
        bars.add("lr_decay", out_bar, q, lr * state["step"] / slowing**2)
        g_bar = scale(out_bar, -lr / slowing) / denominator

        # D = √s + ε,  s = s₀ + g²
        denominator_bar = -g_bar * q
        bars.add("eps", denominator_bar, 1.0)
        sum_bar = plus(root_bar(denominator_bar, root), state_bar.get("sum"))
        g_bar = g_bar + 2 * sum_bar * g
        if state["sum"] is None:
            bars.add("initial_accumulator_value", sum_bar, 1.0)
        else:
            before["sum"] = sum_bar

        bars.add("weight_decay", g_bar, flat)
        flat_bar = out_bar if is_zero(decay) else axpy(out_bar, decay, g_bar)
        return flat_bar, -g_bar if self.maximize else g_bar, before, bars.bars
