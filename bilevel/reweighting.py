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
wrong labels the order of the strategies reverses.

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
from torch.nn import functional as F  # noqa: N812

__all__ = ["LearnedWeights", "Reweighter", "Reweighting", "Temperature", "sequence_losses"]

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
        if not self.end > 0 or not self.start > 0:
            raise ValueError(f"temperatures must be positive, but got {self.end}, {self.start}.")
        if self.burn_in < 0 or self.decay < 0:
            raise ValueError(f"steps must not be negative, but got {self.burn_in}, {self.decay}.")

    def at(self, step: int) -> float:
        """Return r of a step, from 0."""
        if step < self.burn_in:
            return self.start
        return self.end * max(1.0, (self.burn_in + self.decay) / max(1, step))


@dataclass(frozen=True)
class Reweighting:
    """What a batch was weighted by.

    Attributes:
        weights: w of each sample, sum 1 over the samples that count; 0 for the others.
        effective: effective sample size 1/Σ w².
        unweighted: the plain mean of the losses that count.
        dropped: samples whose loss was masked or not finite.
    """

    weights: Tensor
    effective: float
    unweighted: float
    dropped: int


@dataclass(frozen=True)
class Reweighter:
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

    def __call__(
        self, losses: Tensor, *, mask: Tensor | None = None, step: int = 0, group: Any = None
    ) -> tuple[Tensor, Reweighting]:
        """Return Σ w_i ℓ_i and what it was weighted by.

        Args:
            losses: ℓ of each sample (sequence), shape (batch,), with their graph.
            mask: which samples count; None for all.
            step: for the temperature.
            group: a process group of `torch.distributed` whose batches are weighed together; the
                loss is then scaled for gradients that are averaged over its processes.

        Raises:
            ValueError: losses that are averaged already, an empty batch, a mask of another shape,
                or no sample that counts.
        """
        _check(losses, mask)
        counts = losses.detach().isfinite()
        if mask is not None:
            counts = counts & mask.bool()
        everything, all_counts, own = _gathered(losses.detach(), counts, group)
        if not all_counts.any():
            raise ValueError("no sample of the batch counts: all are masked or not finite.")
        weights = torch.zeros_like(everything)
        weights[all_counts] = self.weights(everything[all_counts], self._at(step)).to(weights)
        mine = weights[own]
        scale = 1.0 if group is None else torch.distributed.get_world_size(group)
        # A masked loss may be NaN, and 0 · NaN is NaN.
        kept = torch.where(counts, losses, 0.0)
        info = Reweighting(
            mine,
            float(1 / weights.double().square().sum()),
            float(everything[all_counts].double().mean()),
            int((~all_counts).sum()),
        )
        return scale * (mine.to(losses.dtype) * kept).sum(), info

    def weights(self, losses: Tensor, temperature: float | Tensor | None = None) -> Tensor:
        """Return w of finite losses, shape (batch,); differentiable in both arguments.

        The published weights carry no gradient: detach the losses, as the call does.

        Args:
            losses: f.
            temperature: r; None for that of step 0.
        """
        r = self._at(0) if temperature is None else temperature
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


class LearnedWeights:
    """Weights σ(θ_i) of each training sample, learned by hypergradient: data cleaning.

    The same call as a `Reweighter`, with θ a hyperparameter of an outer level.

        weights = LearnedWeights()
        inner = lambda params, h, batch: weights(losses(params, batch), h["theta"][batch["index"]])
    """

    def __call__(self, losses: Tensor, logits: Tensor) -> Tensor:
        """Return mean_b σ(θ_b) ℓ_b.

        Raises:
            ValueError: losses that are averaged already, or another number of logits.
        """
        _check(losses, None)
        if logits.shape != losses.shape:
            raise ValueError(
                f"logits must have shape {tuple(losses.shape)}, but got {tuple(logits.shape)}."
            )
        return (logits.sigmoid() * losses).mean()


def sequence_losses(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Return the mean cross entropy of the active tokens of each sequence; 0 without any.

    Args:
        logits: shape (batch, length, tokens).
        labels: shape (batch, length).
        ignore_index: label of tokens that are not active.
    """
    losses = F.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=ignore_index
    )
    active = labels != ignore_index
    return losses.sum(dim=1) / active.sum(dim=1).clamp(min=1)


def _check(losses: Tensor, mask: Tensor | None) -> None:
    if losses.dim() != 1 or not len(losses):
        raise ValueError(
            f"losses must hold one loss a sample, shape (batch,), but got {tuple(losses.shape)}; "
            "use reduction='none'."
        )
    if mask is not None and mask.shape != losses.shape:
        raise ValueError(
            f"mask must have shape {tuple(losses.shape)}, but got {tuple(mask.shape)}."
        )


def _gathered(losses: Tensor, counts: Tensor, group: Any) -> tuple[Tensor, Tensor, slice]:
    """Return the losses of all processes, which of them count, and where the own ones are."""
    if group is None:
        return losses, counts, slice(len(losses))
    import torch.distributed as dist

    sizes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, len(losses), group=group)
    longest = max(sizes)
    # Losses travel in float64, and batches of different sizes are padded.
    packed = torch.zeros(2, longest, dtype=torch.float64, device=losses.device)
    packed[0, : len(losses)] = torch.where(counts, losses, 0.0).double()
    packed[1, : len(losses)] = counts.double()
    found = [torch.zeros_like(packed) for _ in sizes]
    dist.all_gather(found, packed, group=group)
    parts = [part[:, :size] for part, size in zip(found, sizes, strict=True)]
    everything = torch.cat(parts, dim=1)
    rank = dist.get_rank(group)
    start = sum(sizes[:rank])
    return everything[0].to(losses.dtype), everything[1].bool(), slice(start, start + sizes[rank])


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
