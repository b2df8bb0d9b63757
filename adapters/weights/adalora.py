"""AdaLoRA: an increment in SVD form whose singular values compete for a shrinking budget.

    W = W₀ + (alpha/r₀) P diag(λ) Q,   λ = 0 at the start, P, Q ~ N(0, σ²)
    loss + γ Σ_layers (‖PᵀP − I‖² + ‖QQᵀ − I‖²)
    I = |w ∂L/∂w|,  Ī ← β₁ Ī + (1 − β₁) I,  Ū ← β₂ Ū + (1 − β₂)|I − Ī|,  s(w) = Ī Ū
    S_j = s(λ_j) + mean s(P_·j) + mean s(Q_j·)

Every ΔT steps all λ become zero but the b(t) with the largest S of all layers; b(t) falls from N r₀
to N r_T by a cubic between t_i and T − t_f.

Trained: P, λ, Q and the last layer; frozen: W₀ and the biases.  θ has r₀ (o + i) + r₀ numbers a
layer.  A pruned λ may revive until the budget is final; then the mask stays.  r_T is the given
share of r₀, rounded, at least 1 and at most r₀ − 1.

The numerator of the printed b(t) exceeds b₀; (t − t_i) is meant.  alpha is divided by the initial
rank for ever, as in published code.  Pruning waits until some importance is not zero.  P and Q are
stored as offsets from their start, so that the loss is differentiable in σ; importances are those
of P and Q themselves.  γ and alpha are smooth between two prunings.

The map alone, attached to a model of your own, keeps all ranks: the budget is the learner's.

Source: Zhang et al., AdaLoRA, ICLR 2023, sections 3.1 to 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.finetune import DECAY, learning_rate
from adapters.method import State, every
from adapters.reparam import Parts, Reparam, Start, WeightMap, configured, maps
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
    uses_grads = True
    space = Space(
        lr=learning_rate(0.01),
        weight_decay=DECAY,
        alpha=Grad(6.0, low=0.1, high=64.0, scale="log", doc="alpha; smooth between prunings"),
        std=Grad(0.02, low=1e-3, high=0.3, scale="log", doc="start σ of the vectors; smooth"),
        orthonormal=Grad(
            0.1, low=1e-4, high=10.0, scale="log", doc="weight γ of the regularizer; smooth"
        ),
        rank=Int(2, 32, log=True, default=6, doc="rank r₀ at the start"),
        target=Float(0.1, 0.95, default=0.67, doc="share r_T/r₀ of the ranks at the end, r_T < r₀"),
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
        """Follow the importance of every entry; from step T − t_f on, keep the final mask."""
        with configured(state.model, state.hparams) as layers:
            for name, layer in layers.items():
                self._follow(layer, _tensors(name, state.params), state)
        c = self.setting.constants
        if self.memory["kept"] is not None:
            self._mask(state, self.memory["kept"])
        elif state.step >= c["total"] - round(c["final"] * c["total"]):
            self.memory["kept"] = self._prune(state)

    @every("interval")
    def prune(self, state: State) -> None:
        """Zero all λ but the b(t) most important, until the mask is final."""
        if self.memory["kept"] is None:
            self._prune(state)

    def _prune(self, state: State) -> dict[str, Tensor] | None:
        """Prune to b(t) and return the mask of each layer; None before the first importance."""
        c = self.setting.constants
        scores = self._scores({name: _tensors(name, state.params) for name in maps(state.model)})
        if not scores or not float(torch.cat([*scores.values()]).max()) > 0:
            return None
        total, first = c["total"], c["rank"]
        last = min(max(1, round(c["target"] * first)), first - 1)
        warm_up, final = round(c["warm_up"] * total), round(c["final"] * total)
        n = len(scores)
        kept = _largest(scores, budget(state.step, n * first, n * last, warm_up, final, total))
        self._mask(state, kept)
        return kept

    def _follow(self, layer: WeightMap, keys: Mapping[str, str], state: State) -> None:
        if state.grads is None:  # a gradient that is not finite
            return
        reparam, c, memory = layer.reparam, self.setting.constants, self.memory
        assert isinstance(reparam, AdaLoRA)
        values = {part: state.params[key] for part, key in keys.items()}
        values["P"], values["Q"] = reparam.vectors({**layer.parts, **values})
        for part, key in keys.items():
            now = (values[part] * state.grads[key]).abs()
            average = memory["importance"].get(key, torch.zeros_like(now))
            spread = memory["uncertainty"].get(key, torch.zeros_like(now))
            average = c["beta1"] * average + (1 - c["beta1"]) * now
            spread = c["beta2"] * spread + (1 - c["beta2"]) * (now - average).abs()
            memory["importance"][key], memory["uncertainty"][key] = average, spread

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

    def _mask(self, state: State, kept: Mapping[str, Tensor]) -> None:
        for name, mask in kept.items():
            state.params[_tensors(name, state.params)["lam"]].mul_(mask)


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
