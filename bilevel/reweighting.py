"""Weights of samples from their losses, computed anew in every batch.

    h_i = δ (2 f_i − l_max − l_min)/(l_max − l_min),   w = softmax(s(h)/r),   loss = Σ_i w_i ℓ_i

f are the detached losses of the whole batch; s is the strategy, r > 0 the temperature: r → ∞ is the
plain mean.  w maximizes Σ w_i s_i − r KL(w ‖ uniform) over the simplex.  No state, no validation
set, no second forward.

    linupper    min(h + δ, δ)   linear below mid-range, flat above
    upper       (h + δ)/2       linear
    quadratic   1 − h²/δ²       favors mid-range losses
    extremes    |h|             favors both tails
    uniform     the plain mean

Losses that are low say that a sample is redundant, and high ones that it is hard, or wrong: with
wrong labels strategies that favor high losses lose to the plain mean.  `norm="rank"` and `cap` are
ours.  The temperature's decay is derived: in the released code r is constant after burn-in.

Source: Sow et al., Dynamic loss-based sample reweighting, ICLR 2025, arXiv 2502.06733, section 3.
The released "uniform" strategy is none: it raises the weights of high losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel.weighing import Reweighting, Rule, gathered, scattered

__all__ = ["Reweighter", "Temperature"]

Strategy = Literal["linupper", "upper", "quadratic", "extremes", "uniform"]
Norm = Literal["minmax", "rank"]

_STRATEGIES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "linupper": lambda h, d: torch.clamp(h + d, max=d),
    "upper": lambda h, d: (h + d) / 2,
    "quadratic": lambda h, d: 1 - h.square() / d**2,
    "extremes": lambda h, d: h.abs(),
    "uniform": lambda h, d: torch.zeros_like(h),
}


@dataclass(frozen=True)
class Temperature:
    """r(t) = start for `burn_in` steps, then end · max(1, (burn_in + decay)/t).

    At first losses differ by noise only, and min-max stretches it to the full range.

    Attributes:
        end: r in the end.
        start: r at first; 100 is practically uniform.
        burn_in: steps at `start`.
        decay: further steps in which r falls to `end`.

    Raises:
        ValueError: a temperature that is not positive, or a negative number of steps.
    """

    end: float = 1.0
    start: float = 100.0
    burn_in: int = 0
    decay: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.end < math.inf or not 0 < self.start < math.inf:
            raise ValueError(
                f"temperatures must be positive and finite, but got {self.end}, {self.start}."
            )
        if self.burn_in < 0 or self.decay < 0:
            raise ValueError(f"steps must not be negative, but got {self.burn_in}, {self.decay}.")

    def at(self, step: int) -> float:
        """Return r of a step, from 0."""
        if step < self.burn_in:
            return self.start
        return self.end * max(1.0, (self.burn_in + self.decay) / max(1, step))


@dataclass(frozen=True)
class Reweighter(Rule):
    """Weighs the losses of a batch.

        loss, info = Reweighter("linupper", Temperature(0.4, burn_in=100))(losses, step=step)

    Attributes:
        strategy: s.
        temperature: r, or its schedule.
        delta: δ; only δ/r matters but for "quadratic".
        norm: "minmax", as published, which one huge loss spoils, or "rank".
        cap: largest weight in units of 1/M; what is cut is shared by the others.  None for none.

    Raises:
        ValueError: an unknown name, or a number that is not positive.
    """

    strategy: Strategy = "linupper"
    temperature: float | Temperature = 1.0
    delta: float = 1.0
    norm: Norm = "minmax"
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.strategy not in _STRATEGIES:
            raise ValueError(
                f"strategy must be one of {list(_STRATEGIES)}, but got {self.strategy!r}."
            )
        if self.norm not in ("minmax", "rank"):
            raise ValueError(f"norm must be 'minmax' or 'rank', but got {self.norm!r}.")
        for name in ("delta", "cap", "temperature"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, but got {value}.")
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"cap must be at least 1, or no weights sum to 1, but got {self.cap}.")

    def weigh(
        self,
        losses: Tensor,
        mask: Tensor | None = None,
        *,
        index: Tensor | None = None,
        step: int = 0,
        group: Any = None,
    ) -> Reweighting:
        """See `Rule.weigh`; `index` only names samples in messages, `step` is the temperature's."""
        batch = gathered(losses, mask, index, group)
        return scattered(batch, self.weights(batch.losses[batch.counts], self._at(step)))

    def weights(self, losses: Tensor, temperature: float | Tensor | None = None) -> Tensor:
        """Return w of finite losses, shape (batch,); differentiable in both arguments.

        The published weights carry no gradient: detach the losses, as the call does.

        Args:
            losses: f.
            temperature: r; None for that of step 0.

        Raises:
            ValueError: another shape, no loss, or an r that is not positive and finite.
        """
        if losses.dim() != 1 or not len(losses):
            raise ValueError(
                f"losses must hold one loss a sample, shape (batch,), but got "
                f"{tuple(losses.shape)}."
            )
        r = self._at(0) if temperature is None else temperature
        number = float(r.detach()) if isinstance(r, Tensor) else float(r)
        if not 0 < number < math.inf:
            raise ValueError(f"temperature must be positive and finite, but got {number}.")
        h = self._normalized(losses.to(torch.promote_types(losses.dtype, torch.float32)))
        w = torch.softmax(_STRATEGIES[self.strategy](h, self.delta) / r, dim=0)
        return w if self.cap is None else _capped(w, self.cap / len(w))

    def _normalized(self, f: Tensor) -> Tensor:
        if self.norm == "rank":
            # Ties get their mean rank.
            less = (f[:, None] > f[None]).sum(dim=1)
            equal = (f[:, None] == f[None]).sum(dim=1)
            rank = less + (equal - 1) / 2
            return self.delta * (2 * rank.to(f) / max(1, len(f) - 1) - 1) * (len(f) > 1)
        low, high = torch.aminmax(f)
        spread = (high - low).clamp(min=1e-6)
        return self.delta * (2 * f - high - low) / spread

    def _at(self, step: int) -> float:
        r = self.temperature
        return r.at(step) if isinstance(r, Temperature) else float(r)


def _capped(w: Tensor, most: float) -> Tensor:
    """Cut weights at `most`, and scale up the others until they sum to one."""
    if most * len(w) <= 1:
        return torch.full_like(w, 1 / len(w))
    free = torch.ones_like(w, dtype=torch.bool)
    for _ in range(len(w)):
        left = 1 - most * (~free).sum()
        scaled = torch.where(free, w * left / w[free].sum(), most)
        over = free & (scaled > most)
        if not over.any():
            return scaled
        free = free & ~over
    return torch.where(free, w, most)
