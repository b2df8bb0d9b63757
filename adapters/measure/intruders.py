"""Intruder dimensions: high-ranking singular vectors that no pretrained one resembles.

    m_j = max_l |⟨u_j, u⁰_l⟩|;  the singular vector u_j of W, j ≤ k, is an intruder iff m_j < ε
    W_λ = W + (λ − 1) Σ_{intruders} σ_j u_j v_jᵀ

A random direction in Rⁿ has m < ½ with probability .45 for n = 16 and .87 for n = 32, so the count
says something only for weights with min(outputs, inputs) of about 64 and more.  On small networks
it predicts forgetting weakly.  Compare at equal ‖W − W₀‖: more steps make more intruders.

Source: Shuttleworth et al., LoRA vs full fine-tuning, arXiv 2410.21228, sections 3 and 5.  The
smooth surrogate is ours (derived).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Intruders", "effective_rank", "intruder_penalty", "intruders", "shrink_intruders"]

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Intruders:
    """What was found in a weight.

    Attributes:
        similarity: m_j of the top k singular vectors, shape (k,).
        found: whether each is an intruder.
        energy: share Σ_{intruders} σ² / Σ σ² of the squared norm of W.
    """

    similarity: Tensor
    found: Tensor
    energy: float

    @property
    def count(self) -> int:
        """Number of intruders."""
        return int(self.found.sum())


def intruders(
    before: Tensor, after: Tensor, *, k: int = 10, epsilon: float = 0.5, side: Side = "left"
) -> Intruders:
    """Find the intruder dimensions of a weight.

    Args:
        before: W₀, shape (outputs, inputs); fold convolutions first.
        after: W, of the same shape; merge adapters first.
        k: singular vectors inspected.
        epsilon: ε in (0, 1).
        side: of the singular vectors.

    Raises:
        ValueError: other shapes, k outside 1 ... min(outputs, inputs), or ε outside (0, 1).
    """
    u0, _, _ = _triplets(before, after, k, epsilon, side)
    u, sigma, _ = _svd(after, side)
    similarity = (u[:, :k].T @ u0).abs().amax(dim=1)
    found = similarity < epsilon
    squares = sigma.square()
    total = squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)
    return Intruders(similarity, found, float(squares[:k][found].sum() / total))


def shrink_intruders(
    before: Tensor,
    after: Tensor,
    factor: float | Tensor,
    *,
    k: int = 10,
    epsilon: float = 0.5,
    side: Side = "left",
) -> Tensor:
    """Return W_λ: the intruders' contribution times `factor`; linear in it, so differentiable.

    Report it with a control of equal norm, W + c (W₀ − W): in one replication shrinking intruders
    kept no more of the source than that.
    """
    found = intruders(before, after, k=k, epsilon=epsilon, side=side).found
    u, sigma, v = _svd(after, side)
    kept = (u[:, :k][:, found] * sigma[:k][found]) @ v[:, :k][:, found].T
    return after + (factor - 1) * (kept if side == "left" else kept.T)


def intruder_penalty(
    before: Tensor,
    after: Tensor,
    *,
    k: int = 10,
    epsilon: float = 0.5,
    side: Side = "left",
    sharpness: float = 20.0,
    temperature: float = 50.0,
) -> Tensor:
    """Return Σ_{j ≤ k} sigmoid(β (ε − m̃_j)),  m̃_j = (1/τ) log mean_l e^{τ |⟨u_j, u⁰_l⟩|}.

    A smooth surrogate of the count, differentiable in W while its singular values are distinct.

    Args:
        before: see `intruders`.
        after: see `intruders`.
        k: see `intruders`.
        epsilon: see `intruders`.
        side: see `intruders`.
        sharpness: β.
        temperature: τ.
    """
    u0, _, _ = _triplets(before, after, k, epsilon, side)
    u, _, _ = _svd(after, side)
    cosines = (u[:, :k].T @ u0).abs()
    count = torch.tensor(float(cosines.shape[1]), dtype=cosines.dtype, device=cosines.device)
    soft = (torch.logsumexp(temperature * cosines, dim=1) - count.log()) / temperature
    return torch.sigmoid(sharpness * (epsilon - soft)).sum()


def effective_rank(change: Tensor) -> float:
    """Return exp(entropy of σ/Σσ) of a matrix such as W − W₀; 0 for the zero matrix."""
    sigma = torch.linalg.svdvals(change)
    if not sigma.any():
        return 0.0
    p = sigma / sigma.sum()
    return float(torch.special.entr(p).sum().exp())


def _triplets(
    before: Tensor, after: Tensor, k: int, epsilon: float, side: Side
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments and return the SVD of W₀."""
    if before.dim() != 2 or before.shape != after.shape:
        raise ValueError(
            "before and after must be matrices of one shape, but got "
            f"{tuple(before.shape)} and {tuple(after.shape)}."
        )
    if not 1 <= k <= min(before.shape):
        raise ValueError(f"k must lie in 1 ... {min(before.shape)}, but got {k}.")
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon must lie in (0, 1), but got {epsilon}.")
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', but got {side!r}.")
    return _svd(before, side)


def _svd(matrix: Tensor, side: Side) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors of a side, σ, and vectors of the other side, in at least float32."""
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    u, sigma, vt = torch.linalg.svd(wide, full_matrices=False)
    return (u, sigma, vt.T) if side == "left" else (vt.T, sigma, u)
