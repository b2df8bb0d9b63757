"""Which entries to keep: scores of weights, and selectors with exact counts.

A selector returns a mask with exactly the asked number of ones; ties go to the lower index.
Comparing scores with the k-th one, as published codes do, breaks counts wherever scores tie.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["heads", "low_rank", "n_of_m", "slices", "top_k", "top_k_global", "wanda"]


def low_rank(weight: Tensor, rank: int) -> Tensor:
    """Return |W_r|, W_r the best rank-r approximation of a matrix (LIFT).

    Raises:
        ValueError: rank below 1.  Above min(shape), W_r is W.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, but got {rank}.")
    if rank >= min(weight.shape):
        return weight.abs()
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    approximation: Tensor = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
    return approximation.abs()


def wanda(weight: Tensor, inputs: Tensor) -> Tensor:
    """Return |W_ij| ‖x_j‖₂ for inputs of shape (rows, columns of W) (Sun et al., 2024)."""
    sizes: Tensor = inputs.norm(dim=0)
    return weight.abs() * sizes


def top_k(score: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """Return a mask of the k best entries of one tensor.

    Raises:
        ValueError: k outside 0 ... number of entries, or a NaN score.
    """
    if not 0 <= k <= score.numel():
        raise ValueError(f"k must lie in 0 ... {score.numel()}, but got {k}.")
    if score.isnan().any():
        raise ValueError("the score is NaN somewhere, so there is no best entry.")
    flat = score.detach().reshape(-1)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=largest, stable=True)[:k]] = True
    return mask.view(score.shape)


def top_k_global(
    scores: Mapping[str, Tensor], k: int, *, largest: bool = True
) -> dict[str, Tensor]:
    """Return masks of the k best entries of all tensors together; see `top_k`."""
    if not scores:
        raise ValueError("scores must hold at least one tensor, but is empty.")
    mask = top_k(torch.cat([s.reshape(-1) for s in scores.values()]), k, largest=largest)
    pieces = mask.split_with_sizes([s.numel() for s in scores.values()])
    return {n: p.view(scores[n].shape) for n, p in zip(scores, pieces, strict=True)}


def n_of_m(score: Tensor, n: int, m: int) -> Tensor:
    """Return a mask of the n best of each m neighbors in the last dimension (N:M sparsity).

    Raises:
        ValueError: m does not divide the last dimension, n outside 0 ... m, or a NaN score.
    """
    columns = score.shape[-1]
    if m < 1 or columns % m:
        raise ValueError(f"m must divide the last dimension {columns}, but got {m}.")
    if not 0 <= n <= m:
        raise ValueError(f"n must lie in 0 ... m = {m}, but got {n}.")
    if score.isnan().any():
        raise ValueError("the score is NaN somewhere, so there is no best entry.")
    groups = score.detach().reshape(-1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    best = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    return mask.scatter_(1, best, True).view(score.shape)


def slices(score: Tensor, k: int, dim: int, *, largest: bool = True) -> Tensor:
    """Return a mask of the k best rows (dim 0) or columns (dim 1) of a matrix, by mean score."""
    if score.dim() != 2 or dim not in (0, 1):
        raise ValueError(
            f"slices needs a matrix and dim 0 or 1, but got {tuple(score.shape)} and {dim}."
        )
    kept = top_k(score.mean(dim=1 - dim), k, largest=largest)
    return (kept[:, None] if dim == 0 else kept[None]).expand(score.shape).clone()


def heads(score: Tensor, k: int, n_heads: int, *, largest: bool = True) -> Tensor:
    """Return a mask of the rows of the k best of `n_heads` equal blocks of rows, by mean score."""
    if n_heads < 1 or score.shape[0] % n_heads:
        raise ValueError(f"n_heads must divide {score.shape[0]} rows, but got {n_heads}.")
    kept = top_k(score.reshape(n_heads, -1).mean(dim=1), k, largest=largest)
    rows = kept.repeat_interleave(score.shape[0] // n_heads)
    return rows.view(-1, *[1] * (score.dim() - 1)).expand(score.shape).clone()
