"""Adam and AdamW, and their adjoint in closed form."""

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
    double,
    plus,
    root_bar,
    safe_sqrt,
)
from hypergrad.optimizers.values import Value, Values, check_betas, is_zero

__all__ = ["Adam", "AdamW"]


class _Moments(NamedTuple):
    """What a step computes before it moves; `top` is v or, with amsgrad, the largest v."""

    step: int
    g: Tensor
    m: Tensor
    v: Tensor
    top: Tensor
    root: Tensor
    denominator: Tensor
    c1: float | Tensor
    root_c2: float | Tensor


@dataclass(frozen=True)
class Adam(Optimizer):
    """`torch.optim.Adam`, the same numbers bit for bit in float32 and float64:

        g ← ∇f(w) + λw,   m ← β₁m + (1 − β₁)g,   v ← β₂v + (1 − β₂)g²
        w ← w − η/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε)

    Every number may be tuned; see `Optimizer`.  Bias corrections are computed in double
    precision whatever the dtype of w, and √v has derivative 0 at v = 0, where an entry has had
    no gradient yet.

    The step's derivative in a gradient entry grows like η/ε where |g| ≲ ε: float32
    hypergradients are ill-conditioned at the usual ε = 1e-8 if such entries matter.  ε ≥ 1e-6
    or float64 cures it.

    Source: Kingma and Ba, Adam, ICLR 2015, algorithm 1; Reddi et al., ICLR 2018 (AMSGrad).

    Attributes:
        lr: learning rate η ≥ 0.
        betas: decay rates (β₁, β₂) in [0, 1).
        eps: ε ≥ 0, added to the root.
        weight_decay: λ ≥ 0, added to the gradient.
        amsgrad: divide by the largest v so far.
        maximize: ascend instead of descend.
    """

    lr: Value = 1e-3
    betas: tuple[Value, Value] = (0.9, 0.999)
    eps: Value = 1e-8
    weight_decay: Value = 0.0
    amsgrad: bool = False
    maximize: bool = False

    decoupled: ClassVar[bool] = False
    ranges: ClassVar = {
        "lr": (0.0, torch.inf),
        "beta1": (0.0, 1.0),
        "beta2": (0.0, 1.0),
        "eps": (0.0, torch.inf),
        "weight_decay": (0.0, torch.inf),
    }

    def __post_init__(self) -> None:
        check_betas(type(self).__name__, self.betas)

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """η, β₁, β₂, ε and λ."""
        return {
            "lr": self.lr,
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }

    def init(self, flat: Tensor) -> State:
        """No step yet, zero moments."""
        state: State = {
            "step": 0,
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
        if self.amsgrad:
            state["max_exp_avg_sq"] = torch.zeros_like(flat)
        return state

    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """See the formulas of the class."""
        now = self._moments(flat, grad, state, values)
        lr, decay = values["lr"], values["weight_decay"]
        if self.decoupled and not is_zero(decay):
            flat = scale(flat, 1 - lr * decay)
        after = {"step": now.step, "exp_avg": now.m, "exp_avg_sq": now.v}
        if self.amsgrad:
            after["max_exp_avg_sq"] = now.top
        return add_quotient(flat, -lr / now.c1, now.m, now.denominator), after

    def _moments(self, flat: Tensor, grad: Tensor, state: State, values: Values) -> _Moments:
        """Everything of a step but the move itself."""
        beta1, beta2, decay = values["beta1"], values["beta2"], values["weight_decay"]
        g = -grad if self.maximize else grad
        if not self.decoupled and not is_zero(decay):
            g = axpy(g, decay, flat)
        step = state["step"] + 1
        m = torch.lerp(state["exp_avg"], g, cast(1 - beta1, g))
        v = average_of_squares(state["exp_avg_sq"], g, beta2)
        top = torch.maximum(state["max_exp_avg_sq"], v) if self.amsgrad else v
        c1, c2 = 1 - double(beta1) ** step, 1 - double(beta2) ** step
        root, root_c2 = safe_sqrt(top), c2**0.5
        denominator = root / cast(root_c2, root) + cast(values["eps"], root)
        return _Moments(step, g, m, v, top, root, denominator, c1, root_c2)

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
        """The derivative of `update` by hand: about twenty vector operations, no graph."""
        lr, beta1, beta2, _, decay = (values[k] for k in self.hyperparameters)
        now = self._moments(flat, grad, state, values)
        bars = ValueBars(values, wanted)

        # w ← (1 − ηλ)w − (η/c₁)q,  q = m/D
        q = now.m / now.denominator
        bars.add("lr", out_bar, q, -1 / now.c1)
        per_denominator = scale(out_bar, -lr / now.c1) / now.denominator
        m_bar = plus(per_denominator, state_bar.get("exp_avg"))

        # D = √top/√c₂ + ε
        denominator_bar = -per_denominator * q
        bars.add("eps", denominator_bar, 1.0)
        top_bar = root_bar(denominator_bar, now.root, now.root_c2)
        before: Bars = {}
        if self.amsgrad:
            top_bar = plus(top_bar, state_bar.get("max_exp_avg_sq"))
            risen = now.v >= state["max_exp_avg_sq"]
            before["max_exp_avg_sq"] = torch.where(risen, 0.0, top_bar)
            top_bar = torch.where(risen, top_bar, 0.0)
        v_bar = plus(top_bar, state_bar.get("exp_avg_sq"))

        # m = β₁m₀ + (1 − β₁)g,  v = β₂v₀ + (1 − β₂)g²
        before["exp_avg"] = scale(m_bar, beta1)
        before["exp_avg_sq"] = scale(v_bar, beta2)
        g_bar = scale(m_bar, 1 - beta1) + scale(v_bar, 2 * (1 - beta2)) * now.g
        if "beta1" in bars:
            dc1 = -now.step * double(beta1) ** (now.step - 1)
            bars.add("beta1", out_bar, q, lr * dc1 / now.c1**2)
            bars.add("beta1", m_bar, state["exp_avg"] - now.g)
        if "beta2" in bars:
            dc2 = -now.step * double(beta2) ** (now.step - 1)
            bars.add("beta2", denominator_bar, now.root, -dc2 / (2 * now.root_c2**3))
            bars.add("beta2", v_bar, state["exp_avg_sq"] - now.g**2)

        if self.decoupled:
            bars.add("lr", out_bar, flat, -decay)
            bars.add("weight_decay", out_bar, flat, -lr)
            flat_bar = out_bar if is_zero(decay) else scale(out_bar, 1 - lr * decay)
        else:
            bars.add("weight_decay", g_bar, flat)
            flat_bar = out_bar if is_zero(decay) else axpy(out_bar, decay, g_bar)
        return flat_bar, -g_bar if self.maximize else g_bar, before, bars.bars


@dataclass(frozen=True)
class AdamW(Adam):
    """`torch.optim.AdamW`: `Adam` with decoupled weight decay, w ← (1 − ηλ)w before the step.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019.
    """

    weight_decay: Value = 1e-2

    decoupled: ClassVar[bool] = True
