"""AdaWAC: a weight per sample between a supervised and a consistency loss, at a saddle point.

    min_θ max_{β ∈ [0,1]ⁿ}  (1/n) Σ_i [β_i ℓ_CE,i(θ) + (1 − β_i) ℓ_AC,i(θ)]
    logit β_i ← logit β_i + η δ_i,   δ_i = ℓ_CE,i − ℓ_AC,i, not differentiated

Mirror ascent in β, any descent in θ; θ moves with the updated β.  The inner maximum is known
(derived): P(θ) = (1/n) Σ_i max(ℓ_CE,i, ℓ_AC,i), with β_i = 1 where the supervised loss is larger.
So the scale of ℓ_AC is a threshold, too: it must lie between the losses of the two groups.  A wrong
label has a large ℓ_CE and is kept: this is no filter of label noise.  β is a box of n independent
weights, not a simplex over samples: it does not compose with `bilevel.reweighting`, and each
refuses what the other returns.

The logit form cannot overflow; the published ratio form can, and stores the NaN.

Source: Dong, Xie and Ward, Adaptively weighted data augmentation consistency regularization, ICML
2023, arXiv 2210.01891, algorithm 1.  Burn-in and clamp are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "SaddleWeights",
    "Summary",
    "best_response",
    "labeled",
    "mixed",
    "saddle_value",
    "suggested_scale",
    "trimmed",
]


@dataclass(frozen=True)
class Summary:
    """Where the weights are.

    Attributes:
        mean: of β.
        supervised: share of samples with β > ½.
        clamped: share of samples whose logit is at the clamp.
        visited: share of samples that were seen at least once.
    """

    mean: float
    supervised: float
    clamped: float
    visited: float


class SaddleWeights(nn.Module):
    """β of every sample by its index; part of the `state_dict`, whatever the order of batches.

        weights = SaddleWeights(len(data), step=1.0)
        loss = weights(index, supervised, consistency)   # (batch,) each; moves β, returns a scalar
        loss.backward()

    Args:
        n: number of samples; indices are 0 ... n − 1.
        step: η ≥ 0 of the mirror step.
        init: β before the first visit, in (0, 1).
        clamp: largest |logit|; 6 keeps β in [.0025, .9975], from where it can come back.  None for
            none.
        burn_in: calls in which β does not move yet: at first every loss is large.

    Samples that never come keep `init`.  A state of another number of samples, or one that is not
    finite, is refused by `load_state_dict`, and nothing has moved then.

    Raises:
        ValueError: a count below 1, a negative step, init outside (0, 1), a clamp that is not
            positive or below |logit init|, or a negative burn-in.
    """

    logits: Tensor
    visits: Tensor
    calls: Tensor

    def __init__(
        self,
        n: int,
        *,
        step: float = 1.0,
        init: float = 0.5,
        clamp: float | None = 6.0,
        burn_in: int = 0,
    ) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"n must be at least 1, but got {n}.")
        if not 0 <= step < math.inf:
            raise ValueError(f"step must be finite and not negative, but got {step}.")
        if not 0 < init < 1:
            raise ValueError(f"init must lie in (0, 1), but got {init}.")
        start = math.log(init / (1 - init))
        if clamp is not None and not max(0.0, abs(start)) < clamp:
            raise ValueError(f"clamp must exceed |logit init| = {abs(start):.3g}, but got {clamp}.")
        if burn_in < 0:
            raise ValueError(f"burn_in must not be negative, but got {burn_in}.")
        self.step, self.clamp, self.burn_in = step, clamp, burn_in
        self.register_buffer("logits", torch.full((n,), start, dtype=torch.float64))
        self.register_buffer("visits", torch.zeros(n, dtype=torch.int64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_check_state)  # type: ignore[no-untyped-call]

    def forward(self, index: Tensor, supervised: Tensor, consistency: Tensor) -> Tensor:
        """Take a mirror step and return mean_b [β ℓ_CE + (1 − β) ℓ_AC] with the new β.

        An index that occurs twice in a batch gets the sum of its steps.

        Args:
            index: of the samples, integers of shape (batch,).
            supervised: ℓ_CE of each sample, shape (batch,).
            consistency: ℓ_AC of each sample, with its scale, shape (batch,).

        Raises:
            TypeError: indices that are no integers.
            ValueError: shapes other than (batch,), such as losses that are averaged already, or an
                index outside 0 ... n − 1; nothing has moved then.
            FloatingPointError: a loss is not finite; names the samples, and nothing has moved.
        """
        self._check(index, supervised, consistency)
        delta = (supervised - consistency).detach().to(self.logits)
        with torch.no_grad():
            self.visits.index_add_(0, index, torch.ones_like(index))
            if int(self.calls) >= self.burn_in:
                self.logits.index_add_(0, index, self.step * delta)
                if self.clamp is not None:
                    self.logits.clamp_(-self.clamp, self.clamp)
            self.calls += 1
        return mixed(self.beta(index), supervised, consistency)

    def beta(self, index: Tensor | None = None) -> Tensor:
        """Return β of some samples, or of all.

        Raises:
            TypeError: indices that are no integers.
            ValueError: an index outside 0 ... n − 1.
        """
        if index is not None:
            self._check_index(index)
        return torch.sigmoid(self.logits if index is None else self.logits[index])

    def add(self, increments: Tensor) -> None:
        """Add logit increments of other processes: steps are additive, so that merging is exact.

        Args:
            increments: Σ η δ of each sample elsewhere, shape (n,).

        Raises:
            ValueError: another shape, or an increment that is not finite.
        """
        if increments.shape != self.logits.shape:
            raise ValueError(
                f"increments must have shape {tuple(self.logits.shape)}, but got "
                f"{tuple(increments.shape)}."
            )
        if not increments.isfinite().all():
            raise ValueError("increments must be finite.")
        self.logits += increments.to(self.logits)
        if self.clamp is not None:
            self.logits.clamp_(-self.clamp, self.clamp)

    def summary(self) -> Summary:
        """Return where the weights are; all on one side says that the scale of ℓ_AC is off."""
        beta = self.beta()
        limit = math.inf if self.clamp is None else self.clamp
        return Summary(
            float(beta.mean()),
            float((beta > 0.5).double().mean()),
            float((self.logits.abs() >= limit).double().mean()),
            float((self.visits > 0).double().mean()),
        )

    def _check(self, index: Tensor, supervised: Tensor, consistency: Tensor) -> None:
        self._check_index(index)
        for name, value in (("supervised", supervised), ("consistency", consistency)):
            if value.shape != index.shape or index.dim() != 1:
                raise ValueError(
                    f"{name} must hold a loss for each of {tuple(index.shape)} samples, but has "
                    f"shape {tuple(value.shape)}; use reduction='none', averaged over pixels only."
                )
            finite = value.detach().isfinite()
            if not finite.all():
                raise FloatingPointError(
                    f"{name} is not finite for samples {index[~finite].tolist()}."
                )

    def _check_index(self, index: Tensor) -> None:
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            found = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(
                f"index must be an int64 tensor with the number of each sample in the data set, "
                f"but got {found}."
            )
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self.logits):
            raise ValueError(
                f"index must lie in 0 ... {len(self.logits) - 1}, but got {int(index.min())} ... "
                f"{int(index.max())}."
            )


def _check_state(weights: SaddleWeights, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Refuse a state of another data set before any of it is copied."""
    logits = state.get(f"{prefix}logits")
    if logits is None:
        return  # load_state_dict itself names what is missing
    if logits.shape != weights.logits.shape:
        raise ValueError(
            f"the saved weights are of {len(logits)} samples, but the data set has "
            f"{len(weights.logits)}: they are kept by sample index, so both must be the same."
        )
    if not logits.isfinite().all():
        raise ValueError("the saved weights are not finite.")


def mixed(beta: Tensor, supervised: Tensor, consistency: Tensor) -> Tensor:
    """Return mean [β ℓ_CE + (1 − β) ℓ_AC]."""
    beta = beta.to(supervised.dtype)
    return (beta * supervised + (1 - beta) * consistency).mean()


def saddle_value(supervised: Tensor, consistency: Tensor) -> Tensor:
    """Return P = mean max(ℓ_CE, ℓ_AC), the inner maximum; raises as `SaddleWeights`."""
    _check_losses(supervised=supervised, consistency=consistency)
    return torch.maximum(supervised, consistency).mean()


def best_response(supervised: Tensor, consistency: Tensor) -> Tensor:
    """Return the maximizing β: 1 where ℓ_CE is larger, 0 where smaller, ½ at a tie.

    Raises as `SaddleWeights`.
    """
    _check_losses(supervised=supervised, consistency=consistency)
    return 0.5 * (1 + torch.sign(supervised - consistency))


def suggested_scale(supervised: Tensor, consistency: Tensor) -> float:
    """Return a factor of ℓ_AC that puts its median between the halves of ℓ_CE.

    The midpoint of the medians of the upper and the lower half of ℓ_CE, over the median of ℓ_AC.

    Raises:
        ValueError: fewer than two samples, losses that are averaged already, or a median of ℓ_AC
            that is zero.
        FloatingPointError: a loss is not finite.
    """
    _check_losses(supervised=supervised, consistency=consistency)
    if len(supervised) < 2:
        raise ValueError(f"supervised must hold at least two losses, but got {len(supervised)}.")
    ordered = supervised.detach().sort().values
    half = len(ordered) // 2
    middle = 0.5 * (ordered[:half].median() + ordered[half:].median())
    typical = float(consistency.detach().median())
    if typical <= 0:
        raise ValueError("consistency has median 0: the features have collapsed.")
    return float(middle) / typical


def trimmed(losses: Tensor, ratio: float) -> Tensor:
    """Return the mean of the (1 − ratio) share of a batch with the larger losses, a baseline.

    At least one sample is kept.

    Raises:
        ValueError: ratio outside [0, 1), losses that are averaged already, or an empty batch.
        FloatingPointError: a loss is not finite; it would be among the largest.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1), but got {ratio}.")
    _check_losses(losses=losses)
    kept = max(1, len(losses) - round(ratio * len(losses)))
    return losses.topk(kept).values.mean()


def labeled(losses: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the samples of a mask, such as those with any label, a baseline.

    Losses outside the mask have no part in it, whatever they are.

    Args:
        losses: of each sample, shape (batch,).
        mask: bool, shape (batch,); see `bilevel.dense.has_foreground`.

    Raises:
        TypeError: a mask that is not boolean.
        ValueError: another shape, losses that are averaged already, or a mask without any sample:
            its weights sum to zero, so there is nothing to train on; skip such a batch.
        FloatingPointError: a loss in the mask is not finite.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, but got {mask.dtype}.")
    if mask.shape != losses.shape:
        raise ValueError(
            f"mask must have shape {tuple(losses.shape)}, but got {tuple(mask.shape)}."
        )
    if losses.dim() == 1 and len(losses) and not mask.any():
        raise ValueError("mask has no sample of the batch: the weights sum to zero; skip it.")
    chosen = losses[mask] if losses.dim() else losses
    _check_losses(losses=chosen)
    return chosen.mean()


def _check_losses(**losses: Tensor) -> None:
    shape = next(iter(losses.values())).shape
    for name, value in losses.items():
        if value.dim() != 1 or not len(value) or value.shape != shape:
            raise ValueError(
                f"{name} must hold one loss a sample, shape {tuple(shape) or '(batch,)'}, but has "
                f"shape {tuple(value.shape)}; use reduction='none', averaged over pixels only."
            )
        finite = value.detach().isfinite()
        if not finite.all():
            where = (~finite).nonzero().flatten().tolist()
            raise FloatingPointError(f"{name} is not finite at the places {where} of the batch.")
