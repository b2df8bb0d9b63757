"""A batch of losses that is weighed as one, over masks, micro-batches and processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batch", "Reweighting", "Rule", "gathered", "scattered"]


@dataclass(frozen=True)
class Reweighting:
    """What a batch was weighed by.

    Attributes:
        weights: w of each sample of this process, shape (batch,); over all processes they sum to 1
            over the samples that count, and are 0 for the others.
        effective: effective sample size 1/Σ w², over all processes.
        unweighted: the plain mean of the losses that count, over all processes.
        dropped: samples that a mask took out, over all processes.
        scale: processes, by which a loss is multiplied, since their gradients are averaged.
    """

    weights: Tensor
    effective: float
    unweighted: float
    dropped: int
    scale: int = 1

    def loss(self, losses: Tensor, rows: slice | Tensor | None = None) -> Tensor:
        """Return scale · Σ_{i in rows} w_i ℓ_i, the share of a micro-batch.

        The shares of disjoint rows that cover the batch sum to the loss of the batch, and so do
        their gradients.

        Args:
            losses: ℓ of the rows, with their graph.
            rows: of the batch; None for all.

        Raises:
            ValueError: another number of losses than rows.
        """
        weights = self.weights if rows is None else self.weights[rows]
        if losses.shape != weights.shape:
            raise ValueError(
                f"losses must have shape {tuple(weights.shape)}, one for each row, but got "
                f"{tuple(losses.shape)}."
            )
        return self.scale * (weights.to(losses.dtype) * losses).sum()


class Rule(ABC):
    """Weighs the losses of a batch; learned weights and those from losses are called alike."""

    def __call__(
        self,
        losses: Tensor,
        mask: Tensor | None = None,
        *,
        index: Tensor | None = None,
        step: int = 0,
        group: Any = None,
    ) -> tuple[Tensor, Reweighting]:
        """Return Σ w_i ℓ_i and what it was weighed by; arguments and errors of `weigh`."""
        info = self.weigh(losses, mask, index=index, step=step, group=group)
        return info.loss(losses), info

    @abstractmethod
    def weigh(
        self,
        losses: Tensor,
        mask: Tensor | None = None,
        *,
        index: Tensor | None = None,
        step: int = 0,
        group: Any = None,
    ) -> Reweighting:
        """Return the weights of a batch, for gradients that are accumulated over micro-batches.

        Weigh the detached losses of the whole batch first, then add up `Reweighting.loss` of the
        micro-batches.

        Args:
            losses: ℓ of each sample (sequence, token), shape (batch,), with their graph.
            mask: which samples count; None for all.
            index: of the samples, int64 of shape (batch,).
            step: for a rule that changes over time.
            group: a process group of `torch.distributed` whose batches are weighed together, one
                of them may be empty; the loss is then scaled for gradients that are averaged over
                its processes.

        Raises:
            TypeError: indices that are no integers.
            ValueError: losses that are averaged already, an empty batch, a mask or indices of
                another shape, or no sample that counts.
            FloatingPointError: a loss is not finite; names the samples.
        """


@dataclass(frozen=True)
class Batch:
    """The samples of all processes.

    Attributes:
        losses: detached, shape (samples,).
        counts: which samples count.
        index: of each sample; −1 where none was given.
        own: where those of this process are.
        scale: number of processes.
    """

    losses: Tensor
    counts: Tensor
    index: Tensor
    own: slice
    scale: int


def gathered(
    losses: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    group: Any,
    known: int | None = None,
) -> Batch:
    """Check the batch of every process and put them together.

    Bad input of one process raises in all of them, so that none waits for another forever.

    Args:
        losses: of this process, shape (batch,); empty only if another process has some.
        mask: which of them count; None for all.
        index: of the samples; only names them in messages unless `known` is given.
        group: a process group of `torch.distributed`; None for this process alone.
        known: index must be there, without repetition and in 0 ... known − 1.

    Raises:
        TypeError: indices that are no integers.
        ValueError: losses that are averaged already, an empty batch, a mask or indices of another
            shape, missing, repeated or out of range, or no sample that counts.
        FloatingPointError: a loss that is not finite, masked or not; names the samples.
    """
    problem = _problem(losses, mask, index, known)
    own, scale = slice(len(losses) if losses.dim() else 0), 1
    if problem is None or group is not None:
        rows = losses if problem is None else losses.new_zeros(0)
        packed = torch.zeros(3, len(rows), dtype=torch.float64, device=losses.device)
        if problem is None:
            packed[0] = losses.detach()
            packed[1] = 1.0 if mask is None else mask.bool()
            packed[2] = -1.0 if index is None else index
        if group is not None:
            packed, own, scale, problem = _exchanged(packed, problem, group)
    if problem is not None:
        raise problem
    counts = packed[1].bool()
    if not len(counts):
        raise ValueError(
            "losses must hold one loss a sample, shape (batch,), but the batch is empty."
        )
    if not counts.any():
        raise ValueError("no sample of the batch counts: all are masked, and weights sum to zero.")
    return Batch(packed[0].to(losses.dtype), counts, packed[2].long(), own, scale)


def scattered(batch: Batch, weights: Tensor) -> Reweighting:
    """Return the weights of this process from those of all samples that count."""
    all_weights = torch.zeros_like(batch.losses, dtype=weights.dtype)
    all_weights = all_weights.masked_scatter(batch.counts, weights)
    return Reweighting(
        all_weights[batch.own],
        float(1 / weights.detach().double().square().sum()),
        float(batch.losses[batch.counts].double().mean()),
        int((~batch.counts).sum()),
        batch.scale,
    )


def _problem(
    losses: Tensor, mask: Tensor | None, index: Tensor | None, known: int | None
) -> Exception | None:
    if losses.dim() != 1:
        return ValueError(
            f"losses must hold one loss a sample, shape (batch,), but got {tuple(losses.shape)}; "
            "use reduction='none'."
        )
    for name, value in (("mask", mask), ("index", index)):
        if value is not None and value.shape != losses.shape:
            return ValueError(
                f"{name} must have shape {tuple(losses.shape)}, but got {tuple(value.shape)}."
            )
    if index is None:
        if known is not None:
            return ValueError(f"index is missing: expected that of each sample, 0 ... {known - 1}.")
    elif index.dtype != torch.int64:
        return TypeError(f"index must be int64, but got {index.dtype}.")
    elif known is not None and len(index):
        if not 0 <= int(index.min()) <= int(index.max()) < known:
            return ValueError(
                f"index must lie in 0 ... {known - 1}, but got {int(index.min())} ... "
                f"{int(index.max())}."
            )
        repeated = (index.bincount() > 1).nonzero().flatten()
        if len(repeated):
            return ValueError(f"index has repeated samples: {repeated.tolist()}.")
    bad = ~losses.detach().isfinite()
    if bad.any():
        names = bad.nonzero().flatten() if index is None else index[bad]
        return FloatingPointError(
            f"losses are not finite for samples {names.tolist()}; a weight of 0 would not keep NaN "
            "out of the gradient, see bilevel.sample_losses.finite_losses."
        )
    return None


def _exchanged(
    packed: Tensor, problem: Exception | None, group: Any
) -> tuple[Tensor, slice, int, Exception | None]:
    """Return the columns of all processes, where the own ones are, and anyone's problem."""
    import torch.distributed as dist

    world, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes: list[Any] = [None] * world
    report = None if problem is None else (type(problem), str(problem))
    dist.all_gather_object(sizes, (packed.shape[1], report), group=group)
    for other, (_, found) in enumerate(sizes):
        if found is not None:
            kind, message = found
            return packed, slice(0), world, problem or kind(f"process {other}: {message}")
    lengths = [length for length, _ in sizes]
    longest = max(lengths)
    # Batches of different sizes are padded.
    padded = torch.nn.functional.pad(packed, (0, longest - packed.shape[1]))
    parts = [torch.zeros_like(padded) for _ in lengths]
    if longest:
        dist.all_gather(parts, padded, group=group)
    start = sum(lengths[:rank])
    columns = torch.cat([p[:, :n] for p, n in zip(parts, lengths, strict=True)], dim=1)
    return columns, slice(start, start + lengths[rank]), world, None
