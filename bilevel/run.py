"""A tuning run in progress: its record, its last whole outer step, and how it goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from typing import Any

import optree
from torch import Tensor

from bilevel.algorithm import Diverged, OuterAlgorithm, OuterStep
from bilevel.budget import Budget
from bilevel.checkpoint import copy
from bilevel.inner import Inner
from bilevel.metrics import Cost, RunStatus
from bilevel.rng import rng_state, set_rng_state
from bilevel.schedule import Schedule

__all__ = ["MAX_RETREATS", "Point", "Record", "Run"]

MAX_RETREATS = 2
"""How often one outer step is tried again after it diverged."""

Record = dict[str, float | int | str | None]
"""One row of a trace."""


@dataclass(frozen=True)
class Point:
    """Weights, and the hyperparameters that they were trained with.

    Attributes:
        outer_step: outer steps done.
        steps: inner steps done.
        loss: validation loss, on the whole split.
        params: the leaves of the weights.
        hparams: constrained values by name.
    """

    outer_step: int
    steps: int
    loss: float
    params: list[Tensor]
    hparams: dict[str, Tensor]


@dataclass(frozen=True)
class Moment:
    """The end of an outer step: everything that the future depends on.

    Attributes:
        outer_steps: outer steps done.
        cost: work done, failed attempts included.
        costliest: most equivalent steps of one outer step.
        algorithm: state of the outer algorithm.
        inner: state of the inner level.
        rng: states of the global random generators.
        hparams: the values that the weights were trained with.
        best: where the validation loss was lowest.
    """

    outer_steps: int
    cost: Cost
    costliest: int
    algorithm: dict[str, Any]
    inner: dict[str, Any]
    rng: dict[str, Any]
    hparams: dict[str, Tensor]
    best: Point | None


@dataclass
class Run:
    """A tuning run in progress, as callbacks see it.

    Attributes:
        inner: the inner level.
        algorithm: the outer algorithm.
        budget: the limits.
        evaluate_every: outer steps between two validations; None for none.
        schedule: history of the hyperparameters.
        trace: one record for each outer step.
        status: RUNNING until the run is finished or interrupted.
        reason: the status in words.
        returns_best: whether the result has the weights of the lowest validation loss, not the
            last ones.
    """

    inner: Inner
    algorithm: OuterAlgorithm[Any]
    budget: Budget
    evaluate_every: int | None = None
    schedule: Schedule = field(default_factory=Schedule)
    trace: list[Record] = field(default_factory=list)
    status: RunStatus = RunStatus.RUNNING
    reason: str = ""
    returns_best: bool = False
    _moment: Moment = field(init=False, repr=False)

    def __post_init__(self) -> None:
        state = self.algorithm.init(self.inner)
        self.schedule.record(0, self.inner.hparams)
        self._commit(Cost(), 0, state, self.inner.hparams, None)

    @property
    def outer_steps(self) -> int:
        """Outer steps done."""
        return self._moment.outer_steps

    @property
    def cost(self) -> Cost:
        """Work done so far."""
        return self._moment.cost

    @property
    def hparams(self) -> dict[str, Tensor]:
        """The values that the current weights were trained with."""
        return self._moment.hparams

    @property
    def best(self) -> Point | None:
        """Where the validation loss was lowest, once it was evaluated."""
        return self._moment.best

    def stop(self, status: RunStatus, reason: str) -> None:
        """End the run after this outer step."""
        self.status, self.reason = status, reason

    def advance(self) -> None:
        """Do the next outer step; where it diverges, go back and try it again more carefully.

        Sets `status` where the run is finished; then the inner level is at its last good values.
        """
        start = self._moment
        state, cost = start.algorithm, start.cost
        for retreats in count():
            if reason := self._refusal(state, cost):
                self._give_up(cost, RunStatus.MAX_ITER, reason)
                return
            began = time.perf_counter()
            try:
                report, after = self.algorithm.step(self.inner, state)
                val_loss = self._validate(report)
            except Diverged as error:
                cost += replace(error.cost, seconds=time.perf_counter() - began)
                self._rewind()
                less_bold = None
                if retreats < MAX_RETREATS:
                    less_bold = self.algorithm.retreat(self.inner, state)
                if less_bold is None:
                    tries = f" (tried {retreats + 1} times)" if retreats else ""
                    self._give_up(cost, RunStatus.DIVERGED, f"{error}{tries}")
                    return
                state = less_bold
            else:
                cost += replace(report.cost, seconds=time.perf_counter() - began)
                self._accept(report, after, cost, val_loss, retreats)
                return

    def _refusal(self, state: Any, cost: Cost) -> str | None:
        steps = self.algorithm.next_steps(state)
        ahead = Cost(steps=steps, gradients=max(steps, self._moment.costliest))
        limit = self.budget.refuses(cost, self.outer_steps, ahead)
        if limit is None:
            return None
        if self.outer_steps == 0 and cost == Cost():
            raise ValueError(
                f"budget: {limit} do not cover one outer step, which takes {steps} inner steps."
            )
        return f"the budget of {limit} is spent"

    def _validate(self, report: OuterStep) -> float | None:
        """Return the validation loss at the weights and values of the report, where it is due."""
        if self.evaluate_every is None or (self.outer_steps + 1) % self.evaluate_every:
            return None
        coming = self.inner.hparams
        self.inner.set_hparams(report.hparams)
        try:
            loss = self.inner.evaluate("val")["loss"]
        except FloatingPointError as error:
            raise Diverged(str(error), report.cost) from error
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss}", report.cost)
        self.inner.set_hparams(coming)
        return loss

    def _accept(
        self, report: OuterStep, state: Any, cost: Cost, val_loss: float | None, retreats: int
    ) -> None:
        """Write the step down and make it the moment to go on from."""
        outer_step, best = self.outer_steps + 1, self.best
        if val_loss is not None and (best is None or val_loss < best.loss):
            leaves = copy(optree.tree_leaves(self.inner.params))
            best = Point(outer_step, cost.steps, val_loss, leaves, copy(dict(report.hparams)))
        norms = {f"grad_norm/{name}": norm for name, norm in report.grad_norms.items()}
        self.trace.append(
            {
                "outer_step": outer_step,
                "steps": cost.steps,
                "outer_loss": report.loss,
                "val_loss": val_loss,
                "inner_loss": report.inner_loss,
                "grad_norm": report.grad_norm,
                **norms,
                "estimate": report.estimate,
                "residual": report.residual,
                "error_bound": report.error_bound,
                **report.extra,
                "retreats": retreats,
                "gradients": cost.gradients,
                "hvps": cost.hvps,
                "seconds": cost.seconds,
            }
        )
        if retreats:
            self.schedule.amend(report.hparams)
        self.schedule.record(cost.steps, self.inner.hparams)
        self._commit(cost, outer_step, state, report.hparams, best)
        if report.status is not RunStatus.RUNNING:
            self.stop(report.status, report.reason)

    def _commit(
        self,
        cost: Cost,
        outer_steps: int,
        state: Any,
        hparams: Mapping[str, Tensor],
        best: Point | None,
    ) -> None:
        work = 0
        if outer_steps:
            before = self._moment
            work = max(before.costliest, cost.equivalent_steps - before.cost.equivalent_steps)
        inner, rng = copy(self.inner.state_dict()), rng_state()
        # One assignment: an interrupt finds the old moment or the new one.
        self._moment = Moment(outer_steps, cost, work, state, inner, rng, copy(dict(hparams)), best)

    def _rewind(self) -> None:
        self.inner.load_state_dict(copy(self._moment.inner))
        set_rng_state(self._moment.rng)

    def _give_up(self, cost: Cost, status: RunStatus, reason: str) -> None:
        """Finish at the last good moment."""
        if cost != self.cost:
            self._rewind()
            self.inner.set_hparams(self._moment.hparams)
            self.schedule.amend(self._moment.hparams)
            self._moment = replace(self._moment, cost=cost)
        self.stop(status, reason)

    def state_dict(self) -> dict[str, Any]:
        """Return everything up to the last whole outer step, as plain data."""
        moment = self._moment
        return {
            "status": self.status.value,
            "reason": self.reason,
            "trace": [dict(record) for record in self.trace[: moment.outer_steps]],
            "schedule": self.schedule.state_dict(rows=1 + moment.outer_steps),
            "outer_steps": moment.outer_steps,
            "cost": asdict(moment.cost),
            "costliest": moment.costliest,
            "algorithm": moment.algorithm,
            "inner": moment.inner,
            "rng": moment.rng,
            "hparams": moment.hparams,
            "best": None if moment.best is None else vars(moment.best),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a state: the numbers to come are those of the run that was saved.

        A run that was interrupted or had spent its budget is running again; one that had
        converged, diverged or been stopped stays finished.
        """
        status = RunStatus(saved["status"])
        goes_on = status in {RunStatus.RUNNING, RunStatus.INTERRUPTED, RunStatus.MAX_ITER}
        self.status = RunStatus.RUNNING if goes_on else status
        self.reason = "" if goes_on else saved["reason"]
        self.trace = [dict(record) for record in saved["trace"]]
        self.schedule = Schedule.from_state(saved["schedule"])
        self._moment = Moment(
            saved["outer_steps"],
            Cost(**saved["cost"]),
            saved["costliest"],
            saved["algorithm"],
            saved["inner"],
            saved["rng"],
            saved["hparams"],
            None if saved["best"] is None else Point(**saved["best"]),
        )
        self._rewind()
