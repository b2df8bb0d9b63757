"""AdaLoRA: an increment in SVD form whose singular values compete for a shrinking budget.

    W = W₀ + (alpha/r₀) P diag(λ) Q,   λ = 0 at the start, P, Q ~ N(0, σ²)
    loss + γ Σ_layers (‖PᵀP − I‖² + ‖QQᵀ − I‖²)
    I = |w ∂L/∂w|,  Ī ← β₁ Ī + (1 − β₁) I,  Ū ← β₂ Ū + (1 − β₂)|I − Ī|,  s(w) = Ī Ū
    S_j = s(λ_j) + mean s(P_·j) + mean s(Q_j·)

Every ΔT steps all λ become zero but the b(t) with the largest S of all layers; b(t) falls from N r₀
to N r_T by a cubic between t_i and T − t_f.

Trained: P, λ, Q and the last layer; frozen: W₀ and the biases.  θ has r₀ (o + i) + r₀ numbers a
layer.  A pruned λ may revive until the budget is final; then the mask stays.

The numerator of the printed b(t) exceeds b₀; (t − t_i) is meant.  alpha is divided by the initial
rank for ever, as in published code.  Pruning waits until some importance is not zero.  P and Q are
stored as offsets from their start, so that the loss is differentiable in σ; γ and alpha are smooth
between two prunings.

Source: Zhang et al., AdaLoRA, ICLR 2023, sections 3.1 to 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.finetune import DECAY, learning_rate
from adapters.method import State
from adapters.reparam import Parts, Reparam, Start, maps
from adapters.weights.method import WeightAdapter
from adapters.weights.sorsa import orthogonality
from bilevel.domains import Float, Grad, Int
from bilevel.space import Space

__all__ = ["AdaLoRA", "AdaLoRAMethod", "budget"]


@dataclass(frozen=True)
class AdaLoRA(Reparam):
    """W = W₀ + (alpha/r₀) P diag(λ) Q, λ = 0 at the start.

    Attributes:
        rank: r₀.
        alpha: alpha; None for r₀.
        std: σ.
        orthonormal: γ.
    """

    rank: int = 6
    alpha: float | Tensor | None = None
    std: float | Tensor = 0.02
    orthonormal: float | Tensor = 0.1

    def start(self, start: Start) -> Parts:
        r, (rows, columns) = start.check_rank(self.rank), start.weight.shape
        trained = {
            "P": start.zeros(rows, r),
            "lam": start.zeros(r),
            "Q": start.zeros(r, columns),
        }
        return Parts(trained, {"P0": start.normal(rows, r), "Q0": start.normal(r, columns)})

    def vectors(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return P and Q."""
        return parts["P"] + self.std * parts["P0"], parts["Q"] + self.std * parts["Q0"]

    def weight(self, w: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        p, q = self.vectors(parts)
        factor = 1.0 if self.alpha is None else self.alpha / self.rank
        return w + factor * ((p * parts["lam"]) @ q)

    def penalty(self, parts: Mapping[str, Tensor]) -> Tensor:
        """γ (‖PᵀP − I‖² + ‖QQᵀ − I‖²)."""
        p, q = self.vectors(parts)
        return self.orthonormal * (orthogonality(p.T) + orthogonality(q))


def budget(step: int, first: int, last: int, warm_up: int, final: int, total: int) -> int:
    """Return b(t), the singular values that stay after step t of `total`.

    b_T + (b₀ − b_T)(1 − (t − t_i)/(T − t_i − t_f))³, rounded down, between t_i and T − t_f.
    """
    if step < warm_up:
        return first
    if step >= total - final:
        return last
    share = 1 - (step - warm_up) / (total - warm_up - final)
    return int(last + (first - last) * share**3)


class AdaLoRAMethod(WeightAdapter):
    """AdaLoRA: singular values that compete for a shrinking budget (Zhang et al., ICLR 2023)."""

    name = "adalora"
    reparam = AdaLoRA
    space = Space(
        lr=learning_rate(0.01),
        weight_decay=DECAY,
        alpha=Grad(6.0, low=0.1, high=64.0, scale="log", doc="alpha; smooth between prunings"),
        std=Grad(0.02, low=1e-3, high=0.3, scale="log", doc="start σ of the vectors; smooth"),
        orthonormal=Grad(
            0.1, low=1e-4, high=10.0, scale="log", doc="weight γ of the regularizer; smooth"
        ),
        rank=Int(2, 32, log=True, default=6, doc="rank r₀ at the start"),
        target=Float(0.1, 0.95, default=0.67, doc="share r_T/r₀ of the ranks at the end"),
        warm_up=Float(0.0, 0.45, default=0.1, doc="share t_i/T of the run before the budget falls"),
        final=Float(0.0, 0.45, default=0.3, doc="share t_f/T of the run with the final budget"),
        interval=Int(1, 1000, log=True, default=5, doc="steps ΔT between two prunings"),
        total=Int(10, 100_000, log=True, default=250, doc="steps T of the whole run"),
        beta1=Float(0.5, 0.999, default=0.85, doc="decay β₁ of the importance"),
        beta2=Float(0.5, 0.999, default=0.85, doc="decay β₂ of its uncertainty"),
    ).own(lr="sampler")

    def attach(self, model: nn.Module) -> None:
        """Put the maps on."""
        super().attach(model)
        self.memory |= {"importance": {}, "uncertainty": {}, "kept": None}

    def after_step(self, state: State) -> None:
        """Follow the importance of every entry, and prune when it is time."""
        c, layers = self.setting.constants, maps(state.model)
        places = {name: _tensors(name, state.params) for name in layers}
        for entries in places.values():
            for key in entries.values():
                self._follow(key, state)
        total = c["total"]
        warm_up, last = round(c["warm_up"] * total), round(c["final"] * total)
        final = state.step >= total - last
        if self.memory["kept"] is not None:
            self._mask(state, places, self.memory["kept"])
        elif state.step % c["interval"] == 0 or final:
            scores = self._scores(places)
            if not scores or not float(torch.cat([*scores.values()]).max()) > 0:
                return
            ranks = len(layers) * c["rank"]
            kept_ranks = len(layers) * max(1, round(c["target"] * c["rank"]))
            count = budget(state.step, ranks, kept_ranks, warm_up, last, total)
            kept = _largest(scores, count)
            self._mask(state, places, kept)
            if final:
                self.memory["kept"] = kept

    def _follow(self, key: str, state: State) -> None:
        if state.grads is None:  # weights that an estimator trained
            return
        c, memory = self.setting.constants, self.memory
        now = (state.params[key] * state.grads[key]).abs()
        average = memory["importance"].get(key, torch.zeros_like(now))
        spread = memory["uncertainty"].get(key, torch.zeros_like(now))
        average = c["beta1"] * average + (1 - c["beta1"]) * now
        memory["importance"][key] = average
        memory["uncertainty"][key] = c["beta2"] * spread + (1 - c["beta2"]) * (now - average).abs()

    def _scores(self, places: Mapping[str, Mapping[str, str]]) -> dict[str, Tensor]:
        """Return S of each layer's triplets; nothing before the first importance."""
        importance, uncertainty = self.memory["importance"], self.memory["uncertainty"]
        if not importance:
            return {}
        found = {}
        for name, key in places.items():
            s = {part: importance[k] * uncertainty[k] for part, k in key.items()}
            found[name] = s["lam"] + s["P"].mean(dim=0) + s["Q"].mean(dim=1)
        return found

    def _mask(
        self, state: State, places: Mapping[str, Mapping[str, str]], kept: Mapping[str, Tensor]
    ) -> None:
        for name, key in places.items():
            state.params[key["lam"]].mul_(kept[name])


def _tensors(name: str, params: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of a layer's P, λ and Q among the trained tensors."""
    prefix = f"{name}.parametrizations." if name else "parametrizations."
    found = {k.rsplit(".", 1)[1]: k for k in params if k.startswith(prefix)}
    return {part: found[part] for part in ("P", "lam", "Q")}


def _largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return 1 for the `count` largest scores of all layers, 0 for the rest; ties by index."""
    flat = torch.cat([*scores.values()])
    mask = torch.zeros_like(flat)
    mask[flat.argsort(descending=True, stable=True)[:count]] = 1.0
    return dict(zip(scores, mask.split_with_sizes([len(s) for s in scores.values()]), strict=True))
