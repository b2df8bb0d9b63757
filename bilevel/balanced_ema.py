"""Averages of parameters whose coefficient balances plasticity and stability (CoIN, LCIA).

    θ*_t = β_t θ*_{t−1} + (1 − β_t) θ_t,   Δ = θ_t − θ*_{t−1}
    F(β) = [L(θ*_t) − L(θ_t)] + λ (θ*_t − θ*_{t−1}),  second order:  β = (L' + λ)/(L'' Δ)

θ is trained task after task; θ* is what is kept.  Every tensor, layer or the whole set shares one
coefficient, from L1 norms, with L'' as a difference quotient of gradients:

    LiteralRule β = (‖g‖ + λ) ‖θ_t − θ_{t−1}‖ / (‖θ_t − θ*‖ ‖g_t − g_{t−1}‖)      as printed
    Published   1 − β = κ (1 + ‖g‖) / (‖θ_t − θ*‖ ‖g_t − g_{t−1}‖)               as released
    Fixed       β
    Polynomial  1 − β = c/t

The released code has the roles of β and 1 − β exchanged, and its coefficient shrinks with the
number of parameters; λ is a free trade-off that the derivation does not determine (derived, see the
guide).  Outside (0, 1), and where a norm is zero, β is the fallback, and that is counted.

Source: Qiao et al., Large continual instruction assistant, ICML 2025, arXiv 2410.10868, section 3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BalancedEMA",
    "Fixed",
    "LiteralRule",
    "Norms",
    "Polynomial",
    "Published",
    "Rule",
    "Stats",
    "coefficient_gradient",
]


class Norms(NamedTuple):
    """What a rule may look at: L1 norms of one tensor, layer or set.

    Attributes:
        gradient: ‖g_t‖.
        change: ‖g_t − g_{t−1}‖; None without an earlier gradient.
        move: ‖θ_t − θ_{t−1}‖; None without an earlier value.
        lag: ‖θ_t − θ*_{t−1}‖.
        step: t, from 1.
    """

    gradient: float
    change: float | None
    move: float | None
    lag: float
    step: int


class Rule(ABC):
    """How β is chosen; subclasses are frozen dataclasses."""

    @abstractmethod
    def coefficient(self, norms: Norms) -> float | None:
        """Return β, or None where the rule says nothing."""


@dataclass(frozen=True)
class Fixed(Rule):
    """A constant β in [0, 1]; 0.99 is the usual EMA."""

    old: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.old <= 1:
            raise ValueError(f"old must lie in [0, 1], but got {self.old}.")

    def coefficient(self, norms: Norms) -> float | None:
        return self.old


@dataclass(frozen=True)
class Polynomial(Rule):
    """1 − β = min(1, c/t): c = 1 is the mean of all iterates; 0.2 the most robust in small studies.

    The dynamics of `Published` under a constant drift tend to it (derived).
    """

    c: float = 0.2

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"c must be positive, but got {self.c}.")

    def coefficient(self, norms: Norms) -> float | None:
        return 1 - min(1.0, self.c / norms.step)


@dataclass(frozen=True)
class LiteralRule(Rule):
    """β = (‖g‖ + λ) ‖θ_t − θ_{t−1}‖ / (‖θ_t − θ*‖ ‖g_t − g_{t−1}‖).

    With λ = 0 it does not depend on the number of parameters.  λ = 1, the paper's, carries the
    units of a gradient.
    """

    trade_off: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.trade_off < math.inf:
            raise ValueError(f"trade_off must not be negative, but got {self.trade_off}.")

    def coefficient(self, norms: Norms) -> float | None:
        if not norms.change or not norms.move or not norms.lag:
            return None
        return (norms.gradient + self.trade_off) * norms.move / (norms.lag * norms.change)


@dataclass(frozen=True)
class Published(Rule):
    """1 − β = κ (1 + ‖g‖) / (‖θ_t − θ*‖ ‖g_t − g_{t−1}‖), the released code with κ = 2.

    κ fits adapters of about 5 · 10⁵ numbers; 1 − β is inversely proportional to that size.
    """

    kappa: float = 2.0

    def __post_init__(self) -> None:
        if not self.kappa > 0:
            raise ValueError(f"kappa must be positive, but got {self.kappa}.")

    def coefficient(self, norms: Norms) -> float | None:
        if not norms.change or not norms.lag:
            return None
        return 1 - self.kappa * (1 + norms.gradient) / (norms.lag * norms.change)


@dataclass(frozen=True)
class Stats:
    """What the coefficients were.

    Attributes:
        updates: coefficients chosen.
        fallbacks: how many were the fallback.
        skipped: updates that were skipped because a gradient was not finite.
        last: β of each group in the last update.
    """

    updates: int
    fallbacks: int
    skipped: int
    last: Mapping[str, float]


class BalancedEMA:
    """θ* beside trained parameters, updated after each optimizer step and before `zero_grad`.

        ema = BalancedEMA(dict(model.named_parameters()), Polynomial())
        loss.backward(); optimizer.step(); ema.update(); optimizer.zero_grad()
        with ema.applied():
            evaluate(model)
        ema.end_task()  # the parameters become θ*

    Args:
        params: trained tensors by name; they must have gradients at each update.
        rule: how β is chosen.
        granularity: one β for each "tensor", for each "layer" (the name up to its last dot), or
            "global".
        fallback: β where the rule gives none in (0, 1).

    Raises:
        ValueError: no parameter, an unknown granularity, or a fallback outside [0, 1].
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        rule: Rule,
        *,
        granularity: Literal["tensor", "layer", "global"] = "tensor",
        fallback: float = 0.99,
    ) -> None:
        if not params:
            raise ValueError("params must hold at least one trained tensor, but is empty.")
        groups: dict[str, Callable[[str], str]] = {
            "tensor": lambda name: name,
            "layer": lambda name: name.rpartition(".")[0],
            "global": lambda name: "",
        }
        if granularity not in groups:
            raise ValueError(f"granularity must be one of {list(groups)}, but got {granularity!r}.")
        if not 0 <= fallback <= 1:
            raise ValueError(f"fallback must lie in [0, 1], but got {fallback}.")
        self.params, self.rule, self.fallback = dict(params), rule, fallback
        self._group = {name: groups[granularity](name) for name in params}
        self.average = {name: p.detach().clone() for name, p in params.items()}
        self._before: dict[str, Tensor] | None = None
        self._gradient: dict[str, Tensor] | None = None
        self._step = self._updates = self._fallbacks = self._skipped = 0
        self._last: dict[str, float] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Move θ* towards the parameters.

        An update with a gradient that is not finite is skipped and counted.

        Raises:
            RuntimeError: a parameter has no gradient: under engines that own the gradients the
                rule would quietly become its fallback.
            ValueError: a parameter has changed its shape.
        """
        grads = {}
        for name, parameter in self.params.items():
            if parameter.grad is None:
                raise RuntimeError(
                    f"{name} has no gradient; call update() after step() and before zero_grad()."
                )
            if parameter.shape != self.average[name].shape:
                raise ValueError(
                    f"{name} had shape {tuple(self.average[name].shape)}, but now has "
                    f"{tuple(parameter.shape)}."
                )
            grads[name] = parameter.grad.detach().clone()
        if not all(bool(g.isfinite().all()) for g in grads.values()):
            self._skipped += 1
            return
        self._step += 1
        for group, norms in self._norms(grads).items():
            beta = self.rule.coefficient(norms)
            self._updates += 1
            if beta is None or not (0 < beta < 1 or isinstance(self.rule, Fixed | Polynomial)):
                beta = self.fallback
                self._fallbacks += 1
            self._last[group] = beta
        for name, parameter in self.params.items():
            weight = 1 - self._last[self._group[name]]
            self.average[name].lerp_(parameter.detach(), weight)
        self._gradient = grads
        self._before = {name: p.detach().clone() for name, p in self.params.items()}

    def _norms(self, grads: Mapping[str, Tensor]) -> dict[str, Norms]:
        sums: dict[str, list[float]] = {}
        for name, parameter in self.params.items():
            gradient, value = grads[name], parameter.detach()
            terms = [gradient, value - self.average[name]]
            if self._gradient is not None and self._before is not None:
                terms += [gradient - self._gradient[name], value - self._before[name]]
            norms = [float(t.abs().sum(dtype=torch.float64)) for t in terms]
            total = sums.setdefault(self._group[name], [0.0] * len(norms))
            for i, norm in enumerate(norms):
                total[i] += norm
        return {
            group: Norms(
                gradient=total[0],
                change=total[2] if len(total) > 2 else None,
                move=total[3] if len(total) > 2 else None,
                lag=total[1],
                step=self._step,
            )
            for group, total in sums.items()
        }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run a block with θ* in the parameters; they come back afterwards."""
        saved = {name: p.detach().clone() for name, p in self.params.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(saved)

    def end_task(self) -> None:
        """Put θ* into the parameters, and start the next task's average there."""
        self._write(self.average)
        self._before = self._gradient = None
        self._step = 0

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.params.items():
            parameter.copy_(values[name])

    def stats(self) -> Stats:
        """Return what the coefficients were; more than a fifth of fallbacks means a rule out of
        its range.
        """
        return Stats(self._updates, self._fallbacks, self._skipped, dict(self._last))

    def state_dict(self) -> dict[str, Any]:
        """θ*, the last gradient and values, and the counters."""
        return {
            "average": {n: v.clone() for n, v in self.average.items()},
            "gradient": self._gradient,
            "before": self._before,
            "counts": [self._step, self._updates, self._fallbacks, self._skipped],
            "last": dict(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where a `state_dict` was taken.

        Raises:
            ValueError: other names or shapes.
        """
        found = {n: tuple(v.shape) for n, v in state["average"].items()}
        expected = {n: tuple(v.shape) for n, v in self.average.items()}
        if found != expected:
            raise ValueError(f"state must have shapes {expected}, but got {found}.")
        self.average = {n: state["average"][n].clone() for n in self.average}
        self._gradient, self._before = state["gradient"], state["before"]
        self._step, self._updates, self._fallbacks, self._skipped = state["counts"]
        self._last = dict(state["last"])


def coefficient_gradient(
    grad: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    later: float = 1.0,
) -> float:
    """Return dL_old/dβ_t = Π_{s>t} β_s ⟨∇L_old(θ*_T), θ*_{t−1} − θ_t⟩, exact.

    Args:
        grad: ∇L_old at the final average θ*_T.
        before: θ*_{t−1}.
        params: θ_t.
        later: Π_{s>t} β_s.
    """
    return later * float(sum((grad[n] * (before[n] - params[n])).sum() for n in grad))
