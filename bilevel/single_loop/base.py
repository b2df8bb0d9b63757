"""What all stochastic bilevel algorithms share: state, step sizes, report, retreat."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from bilevel.algorithm import Diverged, OuterAlgorithm, OuterStep
from bilevel.checkpoint import copy
from bilevel.inner import Inner
from bilevel.single_loop.oracle import Oracle, Vectors
from bilevel.single_loop.rates import check_config

__all__ = ["Move", "StochasticBilevel", "StochasticState", "descend"]


class StochasticState(TypedDict):
    """State of a stochastic bilevel algorithm, plain data.

    Attributes:
        step: outer steps done, k; step sizes and draws are functions of it.
        z: unconstrained coordinates.
        v: the adjoint as a flat vector, where the algorithm keeps one.
        scale: what is left of the step sizes after retreats.
        memory: of the gradient estimators; None before the first step.
    """

    step: int
    z: dict[str, Tensor]
    v: Tensor | None
    scale: float
    memory: dict[str, Any] | None


@dataclass(frozen=True)
class Move:
    """Outcome of one outer step.

    Attributes:
        x: the next point.
        slope: the direction that z moved along.
        memory: of the gradient estimators.
    """

    x: Vectors
    slope: Tensor
    memory: Any = None


@dataclass(frozen=True)
class StochasticBilevel(OuterAlgorithm[StochasticState]):
    """Base of the algorithms that move weights, adjoint and hyperparameters by minibatches.

    The weights w, and the adjoint v where there is one, take stochastic gradient steps of their
    own: the update rule of the inner level is not used, its state is passed on as it is.
    Hyperparameters move in the unconstrained coordinates of the space, h = c(z), so bounds hold
    without projections:

        z ← z - outer_lr · d_z,   d_z an estimate of dF/dz = c'(z)ᵀ dF/dh.

    In the trace `loss` is F on the batches of the step, and the gradient norms are those of d_z:
    both are noisy.  A loss or direction that is not finite halves all step sizes and forgets
    adjoint and memory.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range.
    """

    adjoint: ClassVar[bool] = False
    """Whether a v is kept between steps."""

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def updates(self) -> int:
        """Weight updates of one outer step."""
        return 1

    @abstractmethod
    def _advance(
        self, oracle: Oracle, inner: Inner, x: Vectors, memory: Any, k: int, scale: float
    ) -> Move:
        """Return the outcome of outer step `k` from the point `x`, all step sizes times `scale`."""

    def _check(self, inner: Inner) -> None:
        """Raise where the inner level lacks what this algorithm needs."""

    def init(self, inner: Inner) -> StochasticState:
        """See `OuterAlgorithm.init`.

        Raises:
            TypeError: the inner level cannot list its batches and this algorithm needs it.
            ValueError: the gradient owns no hyperparameter.
        """
        if not inner.space.grad:
            raise ValueError(
                "space: the gradient owns none of the hyperparameters "
                f"{list(inner.space)}, so there is nothing to tune; see Space.own."
            )
        self._check(inner)
        z = copy(inner.space.coordinates(inner.hparams))
        with torch.no_grad():
            inner.set_hparams(inner.space.constrain(z))
        v = torch.zeros_like(Oracle(inner, z).start["w"]) if self.adjoint else None
        return {"step": 0, "z": z, "v": v, "scale": 1.0, "memory": None}

    def next_steps(self, state: StochasticState) -> int:
        """See `OuterAlgorithm.next_steps`."""
        return self.updates

    def step(self, inner: Inner, state: StochasticState) -> tuple[OuterStep, StochasticState]:
        """See `OuterAlgorithm.step`.

        Raises:
            Diverged: a loss or a direction is not finite.
            ValueError: a hyperparameter enters neither loss.
        """
        oracle, k = Oracle(inner, state["z"]), state["step"]
        x = oracle.start if state["v"] is None else {**oracle.start, "v": state["v"]}
        seen = dict(inner.hparams)
        try:
            move = self._advance(oracle, inner, x, state["memory"], k, state["scale"])
            for name, vector in {**move.x, "dz": move.slope}.items():
                if not bool(torch.isfinite(vector).all()):
                    raise FloatingPointError(f"{name} is not finite after outer step {k}.")
        except FloatingPointError as error:
            raise Diverged(str(error), oracle.cost(self.updates)) from error
        lost = [name for name in state["z"] if name not in oracle.reached]
        if lost:
            raise ValueError(
                f"hparams[{lost[0]!r}] enters neither the inner nor the outer loss; a "
                "hyperparameter of the optimizer, such as a learning rate, needs Unrolled."
            )
        z, slopes = oracle.named(move.x["z"]), oracle.named(move.slope)
        inner.adopt(oracle.params(move.x), inner.optimizer_state, self.updates)
        with torch.no_grad():
            inner.set_hparams(inner.space.constrain(z))
        report = OuterStep(
            loss=oracle.outer_losses.average,
            hparams=seen,
            grad_norms={name: float(d.double().norm()) for name, d in slopes.items()},
            inner_loss=oracle.inner_losses.average,
            cost=oracle.cost(self.updates),
            estimate="stochastic",
            extra={"lr_scale": state["scale"]},
        )
        return report, {
            "step": k + 1,
            "z": z,
            "v": move.x.get("v"),
            "scale": state["scale"],
            "memory": move.memory,
        }

    def retreat(self, inner: Inner, state: StochasticState) -> StochasticState | None:
        """Halve all step sizes, forget adjoint and memory; see `OuterAlgorithm.retreat`."""
        v = None if state["v"] is None else torch.zeros_like(state["v"])
        return {**state, "v": v, "scale": state["scale"] / 2, "memory": None}


def descend(x: Vectors, directions: Vectors, rates: dict[str, float]) -> Vectors:
    """Return x - rate · direction for each variable in `rates`."""
    moved = {name: x[name] - lr * directions[name] for name, lr in rates.items()}
    return {**x, **moved}
