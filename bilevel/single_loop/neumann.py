"""The adjoint v ≈ -(∇²_ww f)⁻¹ ∇_w F by a Neumann series, with a new batch in each factor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from bilevel.single_loop.draws import chance
from bilevel.single_loop.oracle import Linearized
from bilevel.single_loop.rates import Rate, check_config

__all__ = ["Neumann", "Randomized", "Truncated"]


@dataclass(frozen=True)
class Neumann(ABC):
    """A series in factors I - lr Hⱼ, Hⱼ = ∇²_ww f on batch j.

    It converges for lr below 2 / the largest eigenvalue of H; its bias is a relative error of
    (1 - lr μ)^terms in v, μ the smallest eigenvalue.

    Attributes:
        steps: Q.
        lr: step size.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range.
    """

    steps: int = 10
    lr: Rate = 0.1

    def __post_init__(self) -> None:
        check_config(self)

    @abstractmethod
    def factors(self, k: int) -> int:
        """Return the number of batches that outer step `k` takes."""

    @abstractmethod
    def adjoint(self, at: Iterable[Linearized], gradient: Tensor, lr: float) -> Tensor:
        """Return v.

        Args:
            at: f linearized on each batch.
            gradient: ∇_w F.
            lr: step size of this outer step.
        """


@dataclass(frozen=True)
class Truncated(Neumann):
    """v = -lr Σ_{q=0}^{Q} Π_{j≤q} (I - lr Hⱼ) ∇_w F:  Q HVPs, Q + 1 terms.

    Source: Ji, Yang & Liang 2021, Algorithm 3.
    """

    def factors(self, k: int) -> int:
        return self.steps

    def adjoint(self, at: Iterable[Linearized], gradient: Tensor, lr: float) -> Tensor:
        term = total = gradient
        for point in at:
            term = term - lr * point.hvp(term)
            total = total + term
        return -lr * total


@dataclass(frozen=True)
class Randomized(Neumann):
    """v = -Q lr Π_{j≤p} (I - lr Hⱼ) ∇_w F,  p uniform in {0, ..., Q - 1}.

    The expectation is the truncated series of Q terms, for half its HVPs and with a far larger
    variance.

    Attributes:
        seed: of p.

    Source: Ghadimi & Wang 2018, Algorithm 3.
    """

    seed: int = 0

    def factors(self, k: int) -> int:
        return chance(self.seed, k).randrange(self.steps)

    def adjoint(self, at: Iterable[Linearized], gradient: Tensor, lr: float) -> Tensor:
        term = gradient
        for point in at:
            term = term - lr * point.hvp(term)
        return -lr * self.steps * term
