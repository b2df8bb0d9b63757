"""Inner levels that carry smoothness constants, and problems that are averages over samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel.inexact.constants import Smoothness
from bilevel.problem_inner import ProblemInner
from bilevel.space import Space
from hypergrad import SGD, Problem
from hypergrad.optimizers import Optimizer
from hypergrad.tree import Tree

__all__ = ["SampleLoss", "SampleProblem", "SmoothInner", "sample_problem"]

SampleLoss = Callable[[Tree, Tree, Any], Tensor]
"""``(params, hparams, batch) -> (m,)``: one loss for each sample."""


@dataclass(frozen=True)
class SampleProblem(Problem):
    """A `Problem` made by `sample_problem`: m inner problems that share their hyperparameters.

        f(θ) = 1/m Σᵢ gᵢ(x̂ᵢ(θ), θ),    x̂ᵢ(θ) = argmin hᵢ(·, θ).

    Every trained tensor has m rows, and sample i sees row i only.

    Attributes:
        sample_inner_loss: h₁ … hₘ, shape (m,).
        sample_outer_loss: g₁ … gₘ, shape (m,).
    """

    sample_inner_loss: SampleLoss
    sample_outer_loss: SampleLoss


def sample_problem(inner: SampleLoss, outer: SampleLoss) -> SampleProblem:
    """Return the problem of m samples; its losses are the means over them.

    Bounds and constants are those of single samples, so that a sum here and a mean there cannot
    be mixed up.

    Args:
        inner: ``(params, hparams, batch) -> (m,)``; entry i depends on row i of params only.
        outer: the same for the outer loss.
    """

    def mean(losses: SampleLoss) -> Callable[[Tree, Tree, Any], Tensor]:
        return lambda params, hparams, batch: losses(params, hparams, batch).mean()

    return SampleProblem(mean(inner), mean(outer), inner, outer)


class SmoothInner(ProblemInner):
    """A `ProblemInner` that knows the smoothness constants of its losses.

    Args:
        problem: the two losses.
        params: initial weights, copied.
        smoothness: constants; what is left out there is estimated.
        space: domains, all owned by the gradient.
        hparams: a tree of floating tensors; where there is a `space`, initial values by name.
        inner_batch: all data of the inner loss.
        outer_batch: all data of the outer loss, or a stream for `ISGD`.
        val_batch: all validation data, see `ProblemInner`.
        test_batch: all test data.
        optimizer: the update rule of `step`, which inexact methods do not use.
    """

    def __init__(
        self,
        problem: Problem,
        params: Tree,
        smoothness: Smoothness,
        *,
        space: Space | None = None,
        hparams: Tree | None = None,
        inner_batch: Any = None,
        outer_batch: Any = None,
        val_batch: Any = None,
        test_batch: Any = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__(
            problem,
            params,
            optimizer=SGD(lr=0.1) if optimizer is None else optimizer,
            hparams=hparams,
            space=space,
            inner_batch=inner_batch,
            outer_batch=outer_batch,
            val_batch=val_batch,
            test_batch=test_batch,
        )
        self.smoothness = smoothness
