"""Losses of single sequences, tokens and rows, for weights that need one loss each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = ["finite_losses", "sequence_losses", "token_losses"]


def sequence_losses(
    logits: Tensor, labels: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy of the active tokens of each sequence, and which have any.

        loss, info = rule(*sequence_losses(logits, labels))

    Args:
        logits: shape (batch, length, tokens).
        labels: shape (batch, length).
        ignore_index: label of tokens that are not active.

    Returns:
        losses: shape (batch,); 0 without an active token.
        mask: shape (batch,); False there, so that the 0 is not taken for a sample well learned.

    Raises:
        ValueError: shapes that do not fit.
    """
    losses, active = _cross_entropy(logits, labels, ignore_index)
    count = active.sum(dim=1)
    return losses.sum(dim=1) / count.clamp(min=1), count > 0


def token_losses(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of each token, and which are active; for weights over tokens.

    Args:
        logits: shape (batch, length, tokens).
        labels: shape (batch, length).
        ignore_index: label of tokens that are not active.

    Returns:
        losses: shape (batch · length,), sequence by sequence.
        mask: of the same shape.

    Raises:
        ValueError: shapes that do not fit.
    """
    losses, active = _cross_entropy(logits, labels, ignore_index)
    return losses.flatten(), active.flatten()


def finite_losses(losses_of: Callable[[Tensor], Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Return losses without those that are not finite, and which are kept.

    A factor of 0, a `torch.where` or a selection of losses does not keep a NaN out of the
    gradient: inside the graph 0 · NaN is NaN.  So where a loss is not finite, the others are
    computed anew without its row: a second forward pass, in such batches only.  A finite loss
    whose gradient is not finite, such as √0, is not found.

        losses, mask = finite_losses(lambda rows: cross_entropy(net(x[rows]), y[rows]), len(x))

    Args:
        losses_of: int64 rows -> the loss of each, shape (rows,).
        rows: number of rows of the batch.

    Returns:
        losses: shape (rows,), 0 where dropped, without a path to the dropped rows.
        mask: shape (rows,), which rows are kept.

    Raises:
        FloatingPointError: a loss is not finite in the second pass, either: rows are not
            independent, or the network itself is not finite.
    """
    everything = torch.arange(rows)
    losses = losses_of(everything)
    finite = losses.detach().isfinite()
    if finite.all() or not finite.any():
        return (losses if finite.all() else torch.zeros_like(losses)), finite
    kept = everything[finite.cpu()]
    again = losses_of(kept)
    if not again.detach().isfinite().all():
        raise FloatingPointError(
            f"losses are not finite for rows {kept[~again.detach().isfinite().cpu()].tolist()} "
            "without the other bad rows, either."
        )
    return torch.zeros_like(losses).index_put((kept.to(losses.device),), again), finite


def _cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            "expected logits of shape (batch, length, tokens) and labels of shape (batch, length), "
            f"but got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    losses = F.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=ignore_index
    )
    return losses, labels != ignore_index
