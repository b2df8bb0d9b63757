"""What inexact outer algorithms share: their parts, their state, and checks of the problem."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, TypedDict

import optree
import torch
from torch import Tensor

from bilevel.algorithm import Diverged, OuterAlgorithm, OuterStep
from bilevel.inexact.charts import Chart, Coordinates
from bilevel.inexact.constants import Constants, Smoothness
from bilevel.inexact.hypergradient import InexactHypergradient, Tools
from bilevel.inexact.level import Level
from bilevel.inexact.samples import SampleProblem
from bilevel.inexact.solvers import FISTA, LowerSolver
from bilevel.inner import Inner
from bilevel.metrics import RunStatus
from hypergrad import Status

__all__ = ["InexactAlgorithm", "InexactState", "positive"]


class InexactState(TypedDict):
    """State of an inexact algorithm, plain data.

    Attributes:
        step: outer steps done.
        theta: coordinates (d,).
        q: the last adjoint (m, n).
        memory: of the constants.
        search: numbers of the single algorithm.
    """

    step: int
    theta: Tensor
    q: Tensor | None
    memory: dict[str, Any]
    search: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class InexactAlgorithm(OuterAlgorithm[InexactState]):
    """Base of the methods that solve the lower level to an accuracy ε and the adjoint to δ.

    The lower level is solved by `solver`; the update rule of the inner level is not used, its
    state is passed on as it is.  One batch of each loss serves a whole outer step: give full
    batches where the steps belong to one function f.

    Attributes:
        solver: of the lower level.
        smoothness: constants; None takes those of the inner level (`SmoothInner`), or estimates.
        coordinates: "unconstrained" moves along the bijections of the space, "box" between its
            bounds, with projection.
        lower_cap: most gradients of one lower-level solve.
        adjoint_cap: most Hessian-vector products of one adjoint solve.
        damping: added to the Hessian in the adjoint systems, for lower levels that are not
            convex; it biases z, so nothing is certified with it.

    Raises:
        ValueError: an argument out of its range.
    """

    solver: LowerSolver = field(default_factory=FISTA)
    smoothness: Smoothness | None = None
    coordinates: Coordinates = "unconstrained"
    lower_cap: int = 2000
    adjoint_cap: int = 1000
    damping: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.coordinates not in ("unconstrained", "box"):
            raise ValueError(
                f"{name}: coordinates must be 'unconstrained' or 'box', but got "
                f"{self.coordinates!r}."
            )
        for cap in ("lower_cap", "adjoint_cap"):
            if not getattr(self, cap) >= 1:
                raise ValueError(
                    f"{name}: {cap} must be at least 1, but got {getattr(self, cap)!r}."
                )

        if not 0 <= self.damping < math.inf:
            raise ValueError(
                f"{name}: damping must be finite and not negative, but got {self.damping!r}."
            )

    def init(self, inner: Inner) -> InexactState:
        """See `OuterAlgorithm.init`.

        Raises:
            ValueError: the gradient owns no hyperparameter; a simplex in a box.
            NotStronglyConvexError: the inner loss has no positive μ at the start.
        """
        if not inner.space.grad:
            raise ValueError(
                "space: the gradient owns none of the hyperparameters "
                f"{list(inner.space)}, so there is nothing to tune; see Space.own."
            )
        chart = self._chart(inner)
        theta = chart.project(chart.theta(inner.hparams))
        inner.set_hparams(chart.hparams(theta))
        return {"step": 0, "theta": theta, "q": None, "memory": {}, "search": self._start()}

    def next_steps(self, state: InexactState) -> int:
        """See `OuterAlgorithm.next_steps`."""
        return self.lower_cap

    def _chart(self, inner: Inner) -> Chart:
        return Chart.of(inner.space, self.coordinates, inner.hparams)

    def _start(self) -> dict[str, Any]:
        """Return the numbers before the first step."""
        return {}

    def _tools(self, inner: Inner, state: InexactState, rows: list[int] | None = None) -> Tools:
        """Return the parts of one outer step, on new batches."""
        chart = self._chart(inner)
        (inner_batch,) = inner.inner_batches(1)
        outer_batch = inner.outer_batch()
        if state["step"] == 0 and not isinstance(inner.problem, SampleProblem):
            _warn_same_data(inner_batch, outer_batch)
        level = Level(inner, chart, inner_batch, outer_batch, state["step"], rows)
        smoothness = self.smoothness or getattr(inner, "smoothness", None) or Smoothness()
        caps = self.lower_cap, self.adjoint_cap
        return Tools(level, self.solver, smoothness, *caps, self.damping)

    def _adopt(self, inner: Inner, tools: Tools, x: Tensor, theta: Tensor) -> None:
        """Put the inner level at weights and hyperparameters."""
        params = tools.level.params(x)
        inner.adopt(params, inner.optimizer_state, tools.level.steps)
        inner.set_hparams(tools.level.chart.hparams(theta))

    def _report(
        self,
        tools: Tools,
        found: InexactHypergradient,
        theta: Tensor,
        loss: float,
        extra: dict[str, float],
        *,
        certified: bool,
        error_bound: float | None = None,
        status: RunStatus = RunStatus.RUNNING,
        reason: str = "",
    ) -> OuterStep:
        """Return the report of an outer step that ends with weights solved at θ."""
        level = tools.level
        norms = {name: float(v.double().norm()) for name, v in level.chart.named(found.z).items()}
        size = float(found.outer.gradient.double().norm())
        worst = found.solve_status if not found.solve_status.ok else found.adjoint.status
        return OuterStep(
            loss=loss,
            hparams=level.chart.hparams(theta),
            grad_norms=norms,
            inner_loss=None,
            cost=level.cost,
            estimate=worst.value,
            residual=float(found.delta.double().norm()) / size if size else 0.0,
            error_bound=error_bound,
            status=status,
            reason=reason,
            extra={
                "certified": float(certified),
                "lower": found.lower,
                "upper": found.upper,
                **extra,
            },
        )


def certified(constants: Constants, used: frozenset[str], found: InexactHypergradient) -> bool:
    """Return whether no constant in use is an estimate and no curvature was seen to be negative."""
    convex = found.adjoint.status is not Status.NEGATIVE_CURVATURE
    return convex and not constants.estimated & used


def positive(owner: str, **values: float) -> None:
    """Check that numbers are finite and positive.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{owner}: {name} must be finite and positive, but got {value!r}.")


def diverged(error: Exception, tools: Tools) -> Diverged:
    """Return the error as a divergence, with the work so far."""
    return Diverged(str(error), tools.level.cost)


def _warn_same_data(inner_batch: Any, outer_batch: Any) -> None:
    """Warn where both losses see the very same tensors."""
    first, second = (
        {t.data_ptr() for t in optree.tree_leaves(batch) if isinstance(t, torch.Tensor)}
        for batch in (inner_batch, outer_batch)
    )
    if first and first == second:
        warnings.warn(
            "the inner and the outer loss see the same data: hyperparameters will be fitted to "
            "the training set; pass validation data as outer_batch.",
            stacklevel=2,
        )
