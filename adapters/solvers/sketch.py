"""Linear systems by randomized sketches: projections onto random equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Sketch"]

Equations = tuple[NDArray[Any], NDArray[Any]]

CHUNK = 64
"""Sketches between two looks at the residual, which costs as much as several of them."""


class Sketch:
    """A z = b by z ← z − Aᵀ S (Sᵀ A Aᵀ S)⁺ Sᵀ (A z − b): projection onto the sketched equations.

    The error ‖z − z*‖ never grows, whatever S is; the residual may.  S has independent normal
    entries ("gaussian"), or selects rows uniformly ("kaczmarz").  Two baselines are not sketches:
    "exact" solves at once, "gmres" is SciPy's, restarted five times at most.

    Args:
        matrix: A, square, shape (d, d).
        right: b, shape (d,).
        kind: "gaussian", "kaczmarz", "gmres" or "exact".
        block: columns of S.
    """

    def __init__(self, matrix: Tensor, right: Tensor, kind: str, block: int) -> None:
        self._like = right
        self._matrix = matrix.detach().cpu().double().numpy()
        self._right = right.detach().cpu().double().numpy()
        self._kind, self._block = kind, block
        # A row of zeros says nothing about z, and would divide by zero.
        self._rows = np.flatnonzero(np.square(self._matrix).sum(axis=1) > 0)

    def residual(self, z: Tensor) -> float:
        """Return ‖A z − b‖."""
        return float(np.linalg.norm(self._matrix @ z.detach().cpu().double().numpy() - self._right))

    def refine(
        self, z: Tensor, goal: float, budget: int, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """Return a better z and the sketches used: until ‖A z − b‖ ≤ goal or the budget is spent.

        Args:
            z: where to start, shape (d,).
            goal: residual to reach.
            budget: most sketches.
            generator: for S.
        """
        if self._kind == "exact":
            solved = np.linalg.lstsq(self._matrix, self._right, rcond=None)[0]
            return torch.from_numpy(solved).to(self._like), 1
        if self._kind == "gmres":
            return self._krylov(z, goal)
        A, b, used = self._matrix, self._right, 0
        now = z.detach().cpu().double().numpy().copy()
        while used < budget and np.linalg.norm(A @ now - b) > goal:
            count = min(CHUNK, budget - used)
            for S, W in self._draw(count, generator):
                # W = AᵀS; one column is a division, several a small least-squares problem.
                gap = S @ b if self._kind == "gaussian" else b[S]
                if self._block == 1:
                    direction = W[0]
                    now += (gap[0] - direction @ now) / (direction @ direction) * direction
                else:
                    now += np.linalg.lstsq(W, gap - W @ now, rcond=None)[0]
            used += count
        return torch.from_numpy(now).to(self._like), used

    def _krylov(self, z: Tensor, goal: float) -> tuple[Tensor, int]:
        from scipy.sparse.linalg import gmres

        norms: list[float] = []
        size = len(self._right)
        found, _ = gmres(
            self._matrix,
            self._right,
            x0=z.detach().cpu().double().numpy(),
            rtol=0.0,
            atol=goal,
            restart=size,
            maxiter=5,
            callback=norms.append,
            callback_type="pr_norm",
        )
        return torch.from_numpy(found).to(self._like), max(1, len(norms))

    def _draw(self, count: int, generator: torch.Generator) -> list[Equations]:
        """Return (S, SᵀA) of some sketches; for rows S holds their numbers."""
        q, size = self._block, len(self._right)
        if self._kind == "gaussian":
            S = torch.randn(count, q, size, generator=generator, dtype=torch.float64).numpy()
            return list(zip(S, S @ self._matrix, strict=True))
        drawn = torch.randint(len(self._rows), (count, q), generator=generator).numpy()
        rows = self._rows[drawn]
        return list(zip(rows, self._matrix[rows], strict=True))
