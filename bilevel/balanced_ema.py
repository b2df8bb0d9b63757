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

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.balance_rules import (
    Fixed,
    Granularity,
    LiteralRule,
    Norms,
    Polynomial,
    Published,
    Rule,
    group_of,
    measured,
    summed,
)

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
        reduce: sums a tensor over ranks, for parameters that are sharded; where every rank holds
            all parameters and averaged gradients, as under DistributedDataParallel, None.

    The average is kept in float32 at least: in bfloat16 1 − β = 0.01 of a small step is nothing.

    Raises:
        ValueError: no parameter, one that is not finite, an unknown granularity, or a fallback
            outside [0, 1].
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        rule: Rule,
        *,
        granularity: Granularity = "tensor",
        fallback: float = 0.99,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not params:
            raise ValueError("params must hold at least one trained tensor, but is empty.")
        if not 0 <= fallback <= 1:
            raise ValueError(f"fallback must lie in [0, 1], but got {fallback}.")
        self._group = {name: group_of(name, granularity) for name in params}
        self.params, self.rule, self.fallback = dict(params), rule, fallback
        self._granularity, self._reduce = granularity, reduce
        self.average = {name: _wide(p) for name, p in params.items()}
        self._check_values(self.average)
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
            ValueError: a parameter has changed its shape, or is not finite; θ* stays as it is.
        """
        self._check_shapes()
        grads = {}
        for name, parameter in self.params.items():
            if parameter.grad is None:
                raise RuntimeError(
                    f"{name} has no gradient; call update() after step() and before zero_grad()."
                )
            grads[name] = parameter.grad.detach().clone()
        values = {name: _wide(p) for name, p in self.params.items()}
        self._check_values(values)
        if not all(bool(g.isfinite().all()) for g in grads.values()):
            self._skipped += 1
            return
        self._step += 1
        self._last = {}
        for group, norms in self._norms(values, grads).items():
            beta, missed = self.rule.balance(norms, self.fallback)
            self._updates += 1
            self._fallbacks += missed
            self._last[group] = float(beta)
        for name, value in values.items():
            self.average[name].lerp_(value, 1 - self._last[self._group[name]])
        self._gradient, self._before = grads, values

    def _norms(self, values: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> dict[str, Norms]:
        earlier = None
        if self._gradient is not None and self._before is not None:
            earlier = (self._before, self._gradient)
        each = measured(values, self.average, grads, earlier)
        if self._reduce is not None:
            rows = self._reduce(torch.tensor(list(each.values()), dtype=torch.float64)).tolist()
            each = dict(zip(each, rows, strict=True))
        return summed(each, self._granularity, self._step)

    def _check_shapes(self) -> None:
        for name, parameter in self.params.items():
            if parameter.shape != self.average[name].shape:
                raise ValueError(
                    f"{name} had shape {tuple(self.average[name].shape)}, but now has "
                    f"{tuple(parameter.shape)}; start a new average for other parameters."
                )

    @staticmethod
    def _check_values(values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if not value.isfinite().all():
                raise ValueError(f"{name} must be finite, but holds NaN or infinite values.")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run a block with θ* in the parameters; they come back afterwards."""
        self._check_shapes()
        saved = {name: p.detach().clone() for name, p in self.params.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(saved)

    def end_task(self) -> None:
        """Put θ* into the parameters, and start the next task's average there.

        The optimizer's moments belong to the old parameters: start a new one, or clear them.

        Raises:
            ValueError: a parameter has changed its shape.
        """
        self._check_shapes()
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
        """θ*, the last gradient and values, the counters, and which rule they belong to."""
        return {
            "run": self._description(),
            "average": {n: v.clone() for n, v in self.average.items()},
            "gradient": self._gradient,
            "before": self._before,
            "counts": [self._step, self._updates, self._fallbacks, self._skipped],
            "last": dict(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where a `state_dict` was taken.

        Raises:
            ValueError: another rule, granularity or fallback, or other names or shapes; nothing is
                loaded then.
        """
        if state["run"] != self._description():
            raise ValueError(
                f"state must be of {self._description()}, but is of {dict(state['run'])}."
            )
        found = {n: tuple(v.shape) for n, v in state["average"].items()}
        expected = {n: tuple(v.shape) for n, v in self.average.items()}
        if found != expected:
            raise ValueError(f"state must have shapes {expected}, but got {found}.")
        self.average = {n: state["average"][n].clone() for n in self.average}
        self._gradient, self._before = state["gradient"], state["before"]
        self._step, self._updates, self._fallbacks, self._skipped = state["counts"]
        self._last = dict(state["last"])

    def _description(self) -> dict[str, str | float]:
        return {
            "rule": repr(self.rule),
            "granularity": self._granularity,
            "fallback": self.fallback,
        }


def _wide(value: Tensor) -> Tensor:
    """A copy in float32 at least."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    return value.detach().to(dtype, copy=True)


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
