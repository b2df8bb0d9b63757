"""Lion: steps along the sign of a momentum, and what little derivative they have."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hypergrad.optimizers.base import Bars, Optimizer, State, ValueBars
from hypergrad.optimizers.flat import axpy, scale
from hypergrad.optimizers.values import Value, Values, check_betas, is_zero
from hypergrad.tree import Leaves, Tree

__all__ = ["Lion"]


@dataclass(frozen=True)
class Lion(Optimizer):
    """Evolved sign momentum, with decoupled weight decay:

        u = sign(β₁m + (1 − β₁)g),   w ← (1 − ηλ)w − ηu,   m ← β₂m + (1 − β₂)g,   g = ∇f(w)

    With β₁ = β₂ it is Signum, with β₁ = β₂ = 0 signSGD.

    The derivative of sign is 0 wherever it exists, and taken as 0 at 0.  So **no derivative
    passes through a gradient**: an unrolled hypergradient reaches η, λ and the initial w, but is
    exactly 0 in every hyperparameter that acts through the inner loss, such as sample weights
    or a penalty, though the trained w does depend on them, in jumps.  Tune those with an
    estimator that asks for no path (`Implicit`), with `PZOBO`, or with a sampler.  β₁ and β₂ act
    through the sign alone and are refused as tuned values.

    Source: Chen et al., Symbolic discovery of optimization algorithms, NeurIPS 2023, algorithm 2;
    Bernstein et al., signSGD, ICML 2018.

    Attributes:
        lr: learning rate η ≥ 0.
        betas: (β₁, β₂) in [0, 1), constants.
        weight_decay: λ ≥ 0, decoupled.
        maximize: ascend instead of descend.
    """

    lr: Value = 1e-4
    betas: tuple[Value, Value] = (0.9, 0.99)
    weight_decay: Value = 0.0
    maximize: bool = False

    ranges: ClassVar = {
        "lr": (0.0, torch.inf),
        "beta1": (0.0, 1.0),
        "beta2": (0.0, 1.0),
        "weight_decay": (0.0, torch.inf),
    }

    def __post_init__(self) -> None:
        check_betas("Lion", self.betas)

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """η, β₁, β₂ and λ."""
        return {
            "lr": self.lr,
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "weight_decay": self.weight_decay,
        }

    def resolve(self, hparams: Tree, params: Leaves) -> Values:
        """See `Optimizer.resolve`; a beta that asks for a derivative is refused too."""
        values = super().resolve(hparams, params)
        for key in ("beta1", "beta2"):
            value = values[key]
            if torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(
                    f"Lion {key} cannot be tuned by a hypergradient: it acts through "
                    "sign(β₁m + (1 − β₁)g) alone, whose derivative is 0. Tune lr or weight_decay, "
                    f"or let a sampler choose {key}."
                )
        return values

    def init(self, flat: Tensor) -> State:
        """Zero momentum."""
        return {"exp_avg": torch.zeros_like(flat)}

    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """See the formulas of the class."""
        lr, decay = values["lr"], values["weight_decay"]
        g = -grad if self.maximize else grad
        m = axpy(scale(state["exp_avg"], values["beta2"]), 1 - values["beta2"], g)
        if not is_zero(decay):
            flat = scale(flat, 1 - lr * decay)
        return axpy(flat, -lr, self._sign(g, state, values)), {"exp_avg": m}

    @staticmethod
    def _sign(g: Tensor, state: State, values: Values) -> Tensor:
        beta1 = values["beta1"]
        return axpy(scale(state["exp_avg"], beta1), 1 - beta1, g).sign()

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
        lr, beta2, decay = values["lr"], values["beta2"], values["weight_decay"]
        g = -grad if self.maximize else grad
        bars = ValueBars(values, wanted)
        if "lr" in bars:
            bars.add("lr", out_bar, self._sign(g, state, values), -1.0)
            bars.add("lr", out_bar, flat, -decay)
        bars.add("weight_decay", out_bar, flat, -lr)
        flat_bar = out_bar if is_zero(decay) else scale(out_bar, 1 - lr * decay)

        later = state_bar.get("exp_avg")
        if later is None:
            return flat_bar, torch.zeros_like(grad), {}, bars.bars
        bars.add("beta2", later, state["exp_avg"] - g)
        g_bar = scale(later, 1 - beta2)
        before = {"exp_avg": scale(later, beta2)}
        return flat_bar, -g_bar if self.maximize else g_bar, before, bars.bars
