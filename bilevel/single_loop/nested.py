"""Some inner steps, then one hypergradient from plain batches: StocBiO, AmIGO, BSA, TTSA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bilevel.inner import Inner
from bilevel.single_loop.base import Move, StochasticBilevel, descend
from bilevel.single_loop.directions import hypergradient, sgd_adjoint
from bilevel.single_loop.draws import Sample, stream
from bilevel.single_loop.neumann import Neumann, Randomized, Truncated
from bilevel.single_loop.oracle import Oracle, Vectors
from bilevel.single_loop.rates import Decay, Rate, rate

__all__ = ["BSA", "TTSA", "AmIGO", "StocBiO"]


def _train(oracle: Oracle, x: Vectors, batches: Sequence[Any], lr: float) -> Vectors:
    """Return the point after SGD on w, one step for each batch."""
    for batch in batches:
        x = {**x, "w": x["w"] - lr * oracle.slope(x, batch)}
    return x


@dataclass(frozen=True)
class _Nested(StochasticBilevel):
    """SGD on w from where it is, then z along a hypergradient with a Neumann series."""

    inner_lr: Rate = 0.1
    outer_lr: Rate = 0.1
    steps: int = 10
    neumann: Neumann = field(default=Truncated())

    @property
    def updates(self) -> int:
        """See `StochasticBilevel.updates`."""
        return self.steps

    def _advance(
        self, oracle: Oracle, inner: Inner, x: Vectors, memory: Any, k: int, scale: float
    ) -> Move:
        train, (batch, *series) = stream(inner, self.steps, 1 + self.neumann.factors(k))
        x = _train(oracle, x, train, scale * rate(self.inner_lr, k))
        sample = Sample(batch, inner.outer_batch(), series)
        neumann_lr = scale * rate(self.neumann.lr, k)
        slope = hypergradient(oracle, x, sample, self.neumann, neumann_lr)["z"]
        return Move(descend(x, {"z": slope}, {"z": scale * rate(self.outer_lr, k)}), slope)


@dataclass(frozen=True)
class StocBiO(_Nested):
    """Stochastic bilevel optimizer: an inner loop and a truncated Neumann series, constant steps.

    Cost of a step: T + Q + 2 gradients and Q + 1 HVPs.

    Attributes:
        inner_lr: step size of w.
        outer_lr: step size of z.
        steps: T, inner steps.
        neumann: series of Q factors, each on a batch of its own.

    The hypergradient is biased by the truncation: the limit is near the optimum, not at it.

    Source: Ji, Yang & Liang 2021, Algorithms 2 and 3.  The paper lets the batches of the series
    shrink geometrically; here, as in benchmark_bilevel, all have one size.
    """


@dataclass(frozen=True)
class BSA(_Nested):
    """Bilevel stochastic approximation: an inner loop and a randomized Neumann series.

    Cost of a step: T + p + 2 gradients and p + 1 HVPs, p uniform in {0, ..., Q - 1}.

    Attributes:
        inner_lr: step size of w, by default ∝ (k + 1)^-1/2.
        outer_lr: step size of z, the same.
        steps: T, inner steps.
        neumann: series of up to Q - 1 factors; the paper's step is one over the smoothness of f.

    Source: Ghadimi & Wang 2018, Algorithms 2 and 3.  The paper restarts the inner loop at the same
    initial weights each time and lengthens it with k, with steps that decrease within the loop;
    here, as in benchmark_bilevel, the loop goes on from the current weights, has a fixed length,
    and steps decrease with k.  benchmark_bilevel moves h before w; the paper, as here, after it.
    """

    inner_lr: Rate = field(default=Decay(0.1, 0.5))
    outer_lr: Rate = field(default=Decay(0.1, 0.5))
    neumann: Neumann = field(default=Randomized())


@dataclass(frozen=True)
class TTSA(_Nested):
    """Two-timescale stochastic approximation: one step on w, one on z, on different timescales.

    Cost of a step: T + p + 2 gradients and p + 1 HVPs, p uniform in {0, ..., Q - 1}.

    Attributes:
        inner_lr: step size of w, by default ∝ (k + 1)^-2/5.
        outer_lr: step size of z, by default ∝ (k + 1)^-3/5: z stands still as seen from w.
        steps: T, inner steps; 1 in the paper.
        neumann: series of up to Q - 1 factors.

    Source: Hong, Wai, Wang & Yang 2023 (arXiv 2020), Algorithm 1; the exponents are those of its
    smooth nonconvex case.  The cross product has a batch of its own, as in the paper;
    benchmark_bilevel uses that of the step on w again.
    """

    inner_lr: Rate = field(default=Decay(0.1, 0.4))
    outer_lr: Rate = field(default=Decay(0.1, 0.6))
    steps: int = 1
    neumann: Neumann = field(default=Randomized())


@dataclass(frozen=True)
class AmIGO(StochasticBilevel):
    """Amortized implicit gradient optimization: two warm-started inner loops, on w and on v.

    Cost of a step: T + N + 2 gradients and N + 1 HVPs.

    Attributes:
        inner_lr: step size of w.
        outer_lr: step size of z.
        adjoint_lr: step size of v.
        steps: T, SGD steps on f(w).
        adjoint_steps: N, SGD steps on ½ vᵀ ∇²_ww f v + vᵀ ∇_w F, with a new batch of f each and
            one batch of F.

    Source: Arbel & Mairal 2022, Algorithms 1–3.
    """

    adjoint: ClassVar[bool] = True

    inner_lr: Rate = 0.1
    outer_lr: Rate = 0.1
    adjoint_lr: Rate = 0.1
    steps: int = 10
    adjoint_steps: int = 10

    @property
    def updates(self) -> int:
        """See `StochasticBilevel.updates`."""
        return self.steps

    def _advance(
        self, oracle: Oracle, inner: Inner, x: Vectors, memory: Any, k: int, scale: float
    ) -> Move:
        train, (batch, *factors) = stream(inner, self.steps, 1 + self.adjoint_steps)
        x = _train(oracle, x, train, scale * rate(self.inner_lr, k))
        gradient = oracle.outer(x, inner.outer_batch())
        v = sgd_adjoint(oracle, x, gradient["w"], factors, scale * rate(self.adjoint_lr, k))
        slope = gradient["z"] + oracle.linearize(x, batch).cross(v)
        moved = descend(x, {"z": slope}, {"z": scale * rate(self.outer_lr, k)})
        return Move({**moved, "v": v}, slope)
