"""ISGD: stochastic descent with inexact hypergradients, accuracy and step size from schedules."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.algorithm import OuterStep
from bilevel.inexact.base import InexactAlgorithm, InexactState, diverged
from bilevel.inexact.hoag import AccuracySchedule
from bilevel.inexact.hypergradient import inexact_hypergradient
from bilevel.inexact.samples import SampleProblem
from bilevel.inner import Inner
from bilevel.outer_optimizer import OptimizerFactory, optimizer_step
from bilevel.single_loop import Decay, Rate
from bilevel.single_loop.rates import rate

__all__ = ["ISGD"]


@dataclass(frozen=True, kw_only=True)
class ISGD(InexactAlgorithm):
    """θ ← θ - α_k z_k, z_k the inexact hypergradient of some of the samples, to ε_k = δ_k.

    Samples are rows of a `SampleProblem`, of which `batch` are drawn without replacement, or
    what a stream of outer batches holds.  A constant α is faster early and ends at the noise
    level; no step is tested.

    Attributes:
        alpha: α_k, a number or a `Decay`; the theory has a power between ½ and 1, or 0.
        accuracy: ε_k.
        batch: samples for each step; None for all.
        optimizer: a `torch.optim` class that makes a step of -z; Adam is the preconditioned
            variant.
        seed: of the drawn samples.

    Source: Salehi, Mukherjee, Roberts and Ehrhardt 2024 (arXiv 2412.12049).
    """

    alpha: Rate
    accuracy: AccuracySchedule = field(default_factory=partial(Decay, 0.1, 0.0))
    batch: int | None = None
    optimizer: OptimizerFactory = torch.optim.SGD
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        first = rate(self.alpha, 0)
        if not (math.isfinite(first) and first > 0):
            raise ValueError(f"ISGD: alpha must be finite and positive, but got {self.alpha!r}.")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"ISGD: batch must be at least 1, but got {self.batch!r}.")

    def _start(self) -> dict[str, Any]:
        return {"optimizer": None, "scale": 1.0}

    def init(self, inner: Inner) -> InexactState:
        """See `OuterAlgorithm.init`.

        Raises:
            ValueError: `batch` for a problem without samples, or larger than their number.
        """
        if self.batch is not None:
            if not isinstance(inner.problem, SampleProblem):
                raise ValueError(
                    f"ISGD: batch={self.batch} draws rows of a SampleProblem, but the problem is a "
                    f"{type(inner.problem).__name__}; give a stream of outer batches instead."
                )
            count = self._count(inner)
            if self.batch > count:
                raise ValueError(f"ISGD: batch={self.batch}, but there are {count} samples.")
        return super().init(inner)

    def step(self, inner: Inner, state: InexactState) -> tuple[OuterStep, InexactState]:
        """See `OuterAlgorithm.step`.

        Raises:
            Diverged: a loss, a derivative or a constant is not finite.
            NotStronglyConvexError: the inner loss has no positive μ.
            ValueError: a hyperparameter enters neither loss.
        """
        k, theta, search = state["step"], state["theta"], state["search"]
        rows: list[int] | None = None
        if self.batch is not None:
            count = self._count(inner)
            rows = sorted(random.Random(f"{self.seed}/{k}").sample(range(count), self.batch))
        tools, eps = self._tools(inner, state, rows), self.accuracy(k)
        level = tools.level
        q = state["q"] if rows is None or state["q"] is None else state["q"][rows]
        try:
            found, memory = inexact_hypergradient(
                tools, level.start, theta, eps, eps, state["memory"], q
            )
        except FloatingPointError as error:
            raise diverged(error, tools) from error
        alpha = search["scale"] * rate(self.alpha, k)
        extra = {"eps": eps, "alpha": alpha}
        report = self._report(tools, found, theta, found.value, extra, certified=False)
        moved, optimizer = optimizer_step(
            self.optimizer, {"theta": theta}, {"theta": found.z}, {"theta": alpha},
            search["optimizer"],
        )  # fmt: skip
        going = level.chart.project(moved["theta"])
        params, whole = level.params(found.x), found.q
        if rows is not None:
            params = optree.tree_map(partial(_put, rows=rows), inner.params, params)
            count = self._count(inner)
            size = found.q.shape[1]
            before = state["q"]
            whole = found.q.new_zeros(count, size) if before is None else before.clone()
            whole[rows] = found.q
        inner.adopt(params, inner.optimizer_state, level.steps)
        inner.set_hparams(level.chart.hparams(going))
        return report, {
            "step": k + 1,
            "theta": going,
            "q": whole,
            "memory": memory,
            "search": {**search, "optimizer": optimizer},
        }

    def retreat(self, inner: Inner, state: InexactState) -> InexactState | None:
        """Halve all step sizes; see `OuterAlgorithm.retreat`."""
        search = state["search"]
        return {**state, "search": {**search, "scale": search["scale"] / 2}}

    @staticmethod
    def _count(inner: Inner) -> int:
        leaves: list[Tensor] = optree.tree_leaves(inner.params)
        return len(next(leaf for leaf in leaves if leaf.requires_grad))


def _put(full: Tensor, part: Tensor, rows: list[int]) -> Tensor:
    """Return a tensor of all samples with new rows; a constant stays."""
    if not full.requires_grad:
        return full
    moved = full.detach().clone()
    moved[rows] = part.detach()
    return moved.requires_grad_()
