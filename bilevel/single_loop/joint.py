"""One step on weights, adjoint and hyperparameters together: SOBA, SABA, SRBA."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bilevel.inner import Inner
from bilevel.single_loop.base import Move, StochasticBilevel, descend
from bilevel.single_loop.directions import full_joint, inner_part, joint, outer_part
from bilevel.single_loop.draws import chance, listed, numbers, streamed
from bilevel.single_loop.finite import finite
from bilevel.single_loop.oracle import Oracle, Vectors, plus
from bilevel.single_loop.rates import Decay, Rate, rate
from bilevel.single_loop.variance import recursive, saga, tabulate

__all__ = ["SABA", "SOBA", "SRBA"]


@dataclass(frozen=True)
class _Joint(StochasticBilevel):
    """(w, v, z) ← (w - ρ D_w, v - ρ D_v, z - γ D_z), D an estimate of the joint direction."""

    inner_lr: Rate = 0.1
    outer_lr: Rate = 0.1

    adjoint: ClassVar[bool] = True

    @abstractmethod
    def _estimate(
        self, oracle: Oracle, inner: Inner, x: Vectors, memory: Any, k: int
    ) -> tuple[Vectors, Any]:
        """Return D and the next memory."""

    def _advance(
        self, oracle: Oracle, inner: Inner, x: Vectors, memory: Any, k: int, scale: float
    ) -> Move:
        estimate, memory = self._estimate(oracle, inner, x, memory, k)
        rho, gamma = scale * rate(self.inner_lr, k), scale * rate(self.outer_lr, k)
        moved = descend(x, estimate, {"w": rho, "v": rho, "z": gamma})
        return Move(moved, estimate["z"], memory)


@dataclass(frozen=True)
class SOBA(_Joint):
    """Stochastic bilevel algorithm: three plain stochastic directions at one point.

    Cost of a step: 2 gradients and 1 HVP (the cross product comes from the same double backward).

    Attributes:
        inner_lr: ρ, of w and v.
        outer_lr: γ, of z.

    With constant steps the iterates stall at a noise floor proportional to them.

    Source: Dagréou, Ablin, Vaiter & Moreau 2022, Algorithm 1 and eq. 5–7.  The decay
    (k + 1)^-1/2 of both steps is that of the authors' benchmark.
    """

    inner_lr: Rate = field(default=Decay(0.1, 0.5))
    outer_lr: Rate = field(default=Decay(0.1, 0.5))

    def _estimate(
        self, oracle: Oracle, inner: Inner, x: Vectors, memory: Any, k: int
    ) -> tuple[Vectors, Any]:
        return joint(oracle, x, streamed(inner)), None


@dataclass(frozen=True)
class SABA(_Joint):
    """Stochastic average bilevel algorithm: SOBA with SAGA directions and constant steps.

    Five quantities are kept for every batch: ∇_w f, ∇²_ww f v and (∂²f/∂w∂z)ᵀ v of each batch
    of f, ∇_w F and ∇_z F of each batch of F: memory (2 n + m) dim w + (n + m) dim z.

    Cost of a step: 2 gradients and 1 HVP; of the first, which fills the table, n + m gradients
    and n HVPs.  Needs a `FiniteInner`.

    Attributes:
        inner_lr: ρ, of w and v.
        outer_lr: γ, of z.
        seed: of the batch numbers.

    Source: Dagréou et al. 2022, Section 2.2.  The authors' benchmark starts from a table of
    zeros by default and visits batches in shuffled order; here the table is filled at the
    initial point and batches are independent uniform draws, as the analysis assumes.
    """

    seed: int = 0

    def _check(self, inner: Inner) -> None:
        finite(inner, "SABA")

    def _estimate(
        self, oracle: Oracle, inner: Inner, x: Vectors, memory: Any, k: int
    ) -> tuple[Vectors, Any]:
        lists = finite(inner, "SABA")
        inner_list, outer_list = lists.inner_batch_list(), lists.outer_batch_list()
        if memory is None:
            of_f = tabulate([inner_part(oracle, x, batch) for batch in inner_list])
            of_F = tabulate([outer_part(oracle, x, batch) for batch in outer_list])
            return plus(of_f["mean"], of_F["mean"]), {"inner": of_f, "outer": of_F}
        i, j = numbers(lists, chance(self.seed, k))
        d_f, of_f = saga(memory["inner"], i, inner_part(oracle, x, inner_list[i]))
        d_F, of_F = saga(memory["outer"], j, outer_part(oracle, x, outer_list[j]))
        return plus(d_f, d_F), {"inner": of_f, "outer": of_F}


@dataclass(frozen=True)
class SRBA(_Joint):
    """Stochastic recursive bilevel algorithm: SOBA with SARAH directions and constant steps.

    Every `period` steps the directions are averages over all batches; between, they change by
    the difference of one batch's directions at the new and the old point.

    Cost of a step: 4 gradients and 2 HVPs; of a full pass, n + m gradients and n HVPs.  Needs a
    `FiniteInner`.

    Attributes:
        inner_lr: ρ, of w and v.
        outer_lr: γ, of z.
        period: q, steps from one full pass to the next.  The theory asks for about √(n + m);
            the authors' benchmark takes half of the number of batches n + m.
        seed: of the batch numbers.

    Source: Dagréou, Moreau, Vaiter & Ablin 2024, Algorithm 1.
    """

    period: int = 16
    seed: int = 0

    def _check(self, inner: Inner) -> None:
        finite(inner, "SRBA")

    def _estimate(
        self, oracle: Oracle, inner: Inner, x: Vectors, memory: Any, k: int
    ) -> tuple[Vectors, Any]:
        lists = finite(inner, "SRBA")
        if memory is None or k % self.period == 0:
            full = full_joint(oracle, x, lists)
            return full, {"at": x, "estimate": full}
        sample = listed(lists, chance(self.seed, k))
        memory = recursive(lambda at: joint(oracle, at, sample), x, memory, 0.0)
        return memory["estimate"], memory
