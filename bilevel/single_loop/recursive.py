"""Recursive directions instead of a table: MRBO, SUSTAIN, VRBO, FSLA."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from bilevel.inner import Inner
from bilevel.single_loop.base import Move, StochasticBilevel, descend
from bilevel.single_loop.directions import full_hypergradient, hypergradient
from bilevel.single_loop.draws import chance, listed, stream, streamed
from bilevel.single_loop.finite import finite
from bilevel.single_loop.neumann import Neumann, Randomized, Truncated
from bilevel.single_loop.oracle import Oracle, Vectors
from bilevel.single_loop.rates import Decay, Rate, rate
from bilevel.single_loop.variance import recursive

__all__ = ["FSLA", "MRBO", "SUSTAIN", "VRBO"]


@dataclass(frozen=True)
class _DoubleMomentum(StochasticBilevel):
    """STORM on the direction of w and on the hypergradient with a Neumann series."""

    inner_lr: Rate = field(default=Decay(0.1, 1 / 3))
    outer_lr: Rate = field(default=Decay(0.1, 1 / 3))
    momentum: Rate = field(default=Decay(0.5, 2 / 3))
    neumann: Neumann = field(default=Truncated())

    def _advance(
        self, oracle: Oracle, inner: Inner, x: Vectors, memory: Any, k: int, scale: float
    ) -> Move:
        sample, neumann = streamed(inner, self.neumann.factors(k)), self.neumann
        lr = scale * rate(neumann.lr, k)
        memory = recursive(
            lambda at: hypergradient(oracle, at, sample, neumann, lr),
            x,
            memory,
            rate(self.momentum, k),
        )
        estimate = memory["estimate"]
        rates = {"w": scale * rate(self.inner_lr, k), "z": scale * rate(self.outer_lr, k)}
        return Move(descend(x, estimate, rates), estimate["z"], memory)


@dataclass(frozen=True)
class MRBO(_DoubleMomentum):
    """Momentum-based recursive bilevel optimizer: STORM, with a truncated Neumann series.

    Cost of a step: 2 (Q + 2) gradients and 2 (Q + 1) HVPs; of the first, half of it.

    Attributes:
        inner_lr: step size of w, by default ∝ (k + 1)^-1/3.
        outer_lr: step size of z, the same.
        momentum: weight a of the newest sample, by default ∝ (k + 1)^-2/3; 1 is plain sampling.
        neumann: series of Q factors.

    Source: Yang, Ji & Liang 2021, Algorithm 1.  benchmark_bilevel starts the recursion from zero
    vectors; here it starts from the first sample.
    """


@dataclass(frozen=True)
class SUSTAIN(_DoubleMomentum):
    """Double-momentum single-timescale algorithm: STORM, with a randomized Neumann series.

    Cost of a step: 2 (p + 2) gradients and 2 (p + 1) HVPs, p uniform in {0, ..., Q - 1}; of the
    first, half of it.

    Attributes:
        inner_lr: step size of w, by default ∝ (k + 1)^-1/3.
        outer_lr: step size of z, the same.
        momentum: weight a of the newest sample, by default ∝ (k + 1)^-2/3; 1 is plain sampling.
            The paper has one for each direction, equal up to a constant.
        neumann: series of up to Q - 1 factors.

    Source: Khanduri, Zeng, Hong, Wai, Wang & Yang 2021, Algorithm 1.  benchmark_bilevel starts the
    recursion from zero vectors; here it starts from the first sample.
    """

    neumann: Neumann = field(default=Randomized())


@dataclass(frozen=True)
class VRBO(StochasticBilevel):
    """Variance-reduced bilevel optimizer: SPIDER on w and hypergradient, through an inner loop.

    Every `period` outer steps both directions are taken on all batches.  From there on, at each
    inner step, they change by the difference of one sample's directions at the new and the old
    point, and w moves; after the loop z moves once.

    Cost of a step: 2 T (Q + 2) gradients and 2 T (Q + 1) HVPs; with a full pass, n + m gradients
    and n (Q + 1) HVPs in place of those of the first inner step.  Needs a `FiniteInner`.

    Attributes:
        inner_lr: step size of w.
        outer_lr: step size of z.
        steps: T, inner steps.
        neumann: series of Q factors.
        period: q, outer steps from one full pass to the next.
        seed: of the batch numbers.

    Source: Yang, Ji & Liang 2021, Algorithm 2, whose large batch is all data here.  The paper's
    cycle is entered one place later: it moves h before the first inner loop.  benchmark_bilevel
    takes the old point's directions at the *new* h, so that the moves of h are missing from
    the sum until the next full pass; here the differences telescope.
    """

    inner_lr: Rate = 0.1
    outer_lr: Rate = 0.1
    steps: int = 10
    neumann: Neumann = field(default=Truncated())
    period: int = 16
    seed: int = 0

    @property
    def updates(self) -> int:
        """See `StochasticBilevel.updates`."""
        return self.steps

    def _check(self, inner: Inner) -> None:
        finite(inner, "VRBO")

    def _advance(
        self, oracle: Oracle, inner: Inner, x: Vectors, memory: Any, k: int, scale: float
    ) -> Move:
        lists, neumann = finite(inner, "VRBO"), self.neumann
        factors, lr = neumann.factors(k), scale * rate(neumann.lr, k)
        draw, inner_lr = chance(self.seed, k), scale * rate(self.inner_lr, k)
        full = memory is None or k % self.period == 0
        for t in range(self.steps):
            if full and t == 0:
                estimate = full_hypergradient(oracle, x, lists, neumann, factors, lr)
                memory = {"at": x, "estimate": estimate}
            else:
                sample = listed(lists, draw, factors)
                direction = partial(hypergradient, oracle, sample=sample, neumann=neumann, lr=lr)
                memory = recursive(direction, x, memory, 0.0)
            x = descend(x, memory["estimate"], {"w": inner_lr})
        slope = memory["estimate"]["z"]
        moved = descend(x, {"z": slope}, {"z": scale * rate(self.outer_lr, k)})
        return Move(moved, slope, memory)


@dataclass(frozen=True)
class FSLA(StochasticBilevel):
    """Fully single loop algorithm: SGD on w, then on v, then STORM on the direction of z.

    Cost of a step: 7 gradients and 3 HVPs; of the first, 5 and 2.  (w: 1 gradient; v: 2 and 1
    HVP; z: 2 and 1 HVP at each of two points.)

    Attributes:
        inner_lr: step size of w and of v.
        outer_lr: step size of z.
        momentum: weight a of the newest sample in the direction of z; 1 is plain sampling.

    Source: Li, Gu & Huang 2022, Algorithm 1.  benchmark_bilevel ties `momentum` to the inner step
    size and starts the recursion from zero vectors; here it has its own value and starts from
    the first sample.
    """

    adjoint: ClassVar[bool] = True

    inner_lr: Rate = field(default=Decay(0.1, 0.5))
    outer_lr: Rate = field(default=Decay(0.1, 0.5))
    momentum: Rate = field(default=Decay(0.5, 0.5))

    def _advance(
        self, oracle: Oracle, inner: Inner, x: Vectors, memory: Any, k: int, scale: float
    ) -> Move:
        (train,), (for_v, for_z) = stream(inner, 1, 2)
        lr = scale * rate(self.inner_lr, k)
        x = {**x, "w": x["w"] - lr * oracle.slope(x, train)}
        gradient = oracle.outer(x, inner.outer_batch())["w"]
        x = {**x, "v": x["v"] - lr * (oracle.linearize(x, for_v).hvp(x["v"]) + gradient)}
        batch = inner.outer_batch()

        def direction(at: Vectors) -> Vectors:
            direct = oracle.outer(at, batch)["z"]
            return {"z": direct + oracle.linearize(at, for_z).cross(at["v"])}

        memory = recursive(direction, x, memory, rate(self.momentum, k))
        slope = memory["estimate"]["z"]
        moved = descend(x, {"z": slope}, {"z": scale * rate(self.outer_lr, k)})
        return Move(moved, slope, memory)
