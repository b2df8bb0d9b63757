"""The randomized Nyström approximation of a matrix, as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypergrad.linear.solution import Matvec, Memory, Products, norm

__all__ = ["Nystrom"]


@dataclass(frozen=True)
class Nystrom:
    """P⁻¹ = (λᵣ + μ) U (Λ + μ)⁻¹ Uᵀ + (I − U Uᵀ), U Λ Uᵀ ≈ A of rank r, μ the damping.

    The approximation is A Ω (Ωᵀ A Ω)⁻¹ (A Ω)ᵀ with orthonormal random Ω: r products with A,
    evaluated together.  P is positive definite whatever A is, so a bad approximation costs
    iterations and nothing else; that is also why it may serve the systems that follow.
    Worth its products where A has some large eigenvalues, as Hessians of networks do.

    Attributes:
        rank: r; that many vectors are kept.
        every: systems solved with one approximation before it is made anew.
        seed: of Ω.
        chunk: products evaluated together by `torch.vmap`; 1 evaluates one by one.

    Raises:
        ValueError: `rank`, `every` or `chunk` is not positive.

    Source: Frangella, Tropp and Udell 2021, "Randomized Nyström preconditioning", algorithm 2.1
    and eq. 1.3.
    """

    rank: int = 50
    every: int = 10
    seed: int = 0
    chunk: int = 64

    def __post_init__(self) -> None:
        for name in ("rank", "every", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}.")

    def update(self, like: Tensor, memory: Memory | None) -> Products[Memory]:
        """Return the approximation to use for the next system.

        Args:
            like: a vector of the system.
            memory: the last approximation; None makes one.

        Returns:
            ``{"vectors": U (n, r), "values": the diagonal of Λ, "uses": systems solved with it,
            "sketch": approximations made so far}``.
        """
        if memory is not None:
            vectors, uses = memory["vectors"], int(memory["uses"])
            if not isinstance(vectors, Tensor) or len(vectors) != len(like):
                raise ValueError(
                    f"memory is of another system than this one of {len(like)} unknowns."
                )
            if uses < self.every:
                return {**memory, "uses": uses + 1}
        sketch = 0 if memory is None else int(memory["sketch"])
        vectors, values = yield from self._approximate(like, self.seed + sketch)
        return {"vectors": vectors, "values": values, "uses": 1, "sketch": sketch + 1}

    def _approximate(self, like: Tensor, seed: int) -> Products[tuple[Tensor, Tensor]]:
        n, rank = len(like), min(self.rank, len(like))
        generator = torch.Generator().manual_seed(seed)
        # Drawn on the CPU, so that the numbers are the same on every device.
        test = torch.randn(n, rank, generator=generator, dtype=like.dtype).to(like.device)
        test = torch.linalg.qr(test).Q
        rows = []
        for part in torch.split(test.T, self.chunk):
            rows.append((yield part[0])[None] if len(part) == 1 else (yield part.contiguous()))
        y = torch.cat(rows).T
        if not bool(torch.isfinite(y).all()):
            raise FloatingPointError("Nystrom: a product with the operator is not finite.")
        core = test.T @ y
        core = (core + core.T) / 2
        # Lifts rounding and, where A is indefinite, the negative part of Ωᵀ A Ω above zero.
        lowest = float(torch.linalg.eigvalsh(core)[0])
        shift = 4 * torch.finfo(y.dtype).eps * n**0.5 * norm(y) + 2 * max(0.0, -lowest)
        if shift == 0.0:
            return test[:, :0], torch.zeros(0).to(y)
        factor = torch.linalg.cholesky(core + shift * torch.eye(rank).to(core))
        half = torch.linalg.solve_triangular(factor, (y + shift * test).T, upper=False)
        u, singular, _ = torch.linalg.svd(half.T, full_matrices=False)
        values = singular.square() - shift
        kept = values > shift
        return u[:, kept], values[kept]

    @staticmethod
    def inverse(memory: Memory, damping: float) -> Matvec:
        """Return ``v -> P⁻¹ v``."""
        vectors, values = memory["vectors"], memory["values"]
        assert isinstance(vectors, Tensor)
        assert isinstance(values, Tensor)
        if not len(values):
            return lambda v: v
        weights = (values[-1] + damping) / (values + damping) - 1
        return lambda v: torch.addmv(v, vectors, weights * torch.mv(vectors.T, v))
