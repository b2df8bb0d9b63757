"""A trial between its steps: plain training, or training with hypergradients, seen alike."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast

from adapters.learner import Learner
from bilevel.algorithm import OuterAlgorithm
from bilevel.inner import Inner
from bilevel.metrics import Cost, RunStatus
from bilevel.tuning import Tuning
from studies.messages import SCHEDULE, TRACE, Assignment, Outcome, Setting
from studies.record import Failure, TrialRecord, as_numbers

__all__ = ["Plain", "Progress", "Tuned"]

STATIONARY = 1e-3
"""Hypergradient norm, relative to the largest of the trial, at which it has nothing to give."""

ACCURATE = 0.1
"""Largest relative error of a hypergradient that counts as known."""


class Progress(ABC):
    """A trial in one place: it advances by a step, and knows what is stored of it."""

    def __init__(self, setting: Setting, trial: Assignment) -> None:
        self.setting, self.trial = setting, trial
        self.reason = ""
        self._val: tuple[Cost, dict[str, float]] | None = None

    @property
    @abstractmethod
    def status(self) -> RunStatus:
        """RUNNING until the trial is over."""

    @property
    @abstractmethod
    def cost(self) -> Cost:
        """Work done so far."""

    @property
    @abstractmethod
    def outer_steps(self) -> int:
        """Outer steps done; 0 where the gradient moves nothing."""

    @abstractmethod
    def advance(self) -> None:
        """Do one step, or find out that the trial is over."""

    @abstractmethod
    def stop(self, status: RunStatus, reason: str) -> None:
        """End the trial here."""

    @abstractmethod
    def stored(self) -> dict[str, Any]:
        """Return everything that decides the future, as plain data."""

    @abstractmethod
    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `stored` returned."""

    @abstractmethod
    def measure(self, split: str) -> dict[str, float] | None:
        """Return the metrics of a split; None where there is no such split."""

    @abstractmethod
    def hparams(self) -> dict[str, Any]:
        """Return the gradient-owned values; empty where there are none."""

    def outlook(self) -> tuple[float, str]:
        """Return the predicted gain of the next outer step, and why there is none, if so."""
        return 0.0, ""

    def files(self) -> dict[str, str]:
        """Return the artifacts."""
        return {}

    def extra(self) -> dict[str, float]:
        """Return further metrics."""
        return {}

    def values(self, rung: int) -> tuple[float, ...]:
        """Return the study's metrics.

        Raises:
            FloatingPointError: one is not finite.
            ValueError: there is no such metric.
        """
        where = f"at {self.setting.rungs[rung - 1]:.0%} of the budget"
        return _named(self._validated(), self.setting.metrics, where)

    def _validated(self) -> dict[str, float]:
        """The metrics of the validation split, measured once between two steps."""
        if self._val is None or self._val[0] != self.cost:
            self._val = self.cost, self.measure("val") or {}
        return self._val[1]

    def outcome(self, *, evaluate_test: bool) -> Outcome:
        """Return what is stored of the trial as it is now."""
        number, hparams = self.trial.number, self.hparams()
        if self.status is RunStatus.DIVERGED:
            failure = Failure("diverged", self.reason)
            record = TrialRecord(number, "failed", cost=self.cost, failure=failure)
            return Outcome(record, self.files())
        val = self._validated()
        test = (self.measure("test") or {}) if evaluate_test else {}
        named = {
            f"{split}/{name}": value
            for split, found in (("val", val), ("test", test))
            for name, value in found.items()
        }
        where = f"after {self.cost.steps} steps"
        try:
            values = _named(val, self.setting.metrics, where)
            limits = self.setting.constraints
            limited = _named(val, tuple(limits), where)
        except FloatingPointError as error:
            failure = Failure("not finite", str(error))
            record = TrialRecord(number, "failed", cost=self.cost, failure=failure)
            return Outcome(record, self.files())
        record = TrialRecord(
            number,
            _STATES.get(self.status, "complete"),
            values=values,
            hparams=as_numbers({**self.trial.values, **hparams}),
            metrics={**named, **self.extra()},
            constraints={n: v - limits[n] for n, v in zip(limits, limited, strict=True)},
            cost=self.cost,
            seed=self.trial.seed,
            status=self.status.value,
        )
        return Outcome(record, self.files(), hparams)


_STATES: Mapping[RunStatus, Any] = {RunStatus.RUNNING: "running", RunStatus.PRUNED: "pruned"}


class Plain(Progress):
    """A trial in which nothing moves but the weights."""

    def __init__(self, setting: Setting, trial: Assignment, learner: Learner) -> None:
        super().__init__(setting, trial)
        self._learner, self._cost, self._status = learner, Cost(), RunStatus.RUNNING

    @property
    def status(self) -> RunStatus:
        """See `Progress.status`."""
        return self._status

    @property
    def cost(self) -> Cost:
        """See `Progress.cost`."""
        return self._cost

    @property
    def outer_steps(self) -> int:
        """See `Progress.outer_steps`."""
        return 0

    def advance(self) -> None:
        """See `Progress.advance`; every step of the learner is one unit of the budget."""
        limit = self.setting.budget.refuses(self._cost, 0, Cost(steps=1, gradients=1))
        if limit is not None:
            self.stop(RunStatus.MAX_ITER, f"the budget of {limit} is spent")
            return
        began = time.perf_counter()
        metrics = self._learner.step()
        self._cost += replace(metrics.cost, seconds=time.perf_counter() - began)
        if metrics.status is RunStatus.DIVERGED:
            reason = f"the training loss is not finite at step {self._cost.steps}"
            self.stop(metrics.status, reason)
        elif metrics.status.finished:
            self.stop(metrics.status, f"the learner is finished: {metrics.status.value}")

    def stop(self, status: RunStatus, reason: str) -> None:
        """See `Progress.stop`."""
        self._status, self.reason = status, reason

    def stored(self) -> dict[str, Any]:
        """See `Progress.stored`."""
        return {
            "learner": self._learner.state_dict(),
            "cost": asdict(self._cost),
            "status": self._status.value,
            "reason": self.reason,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """See `Progress.load`."""
        self._learner.load_state_dict(saved["learner"])
        self._cost = Cost(**saved["cost"])
        self.stop(RunStatus(saved["status"]), saved["reason"])

    def measure(self, split: str) -> dict[str, float] | None:
        """See `Progress.measure`."""
        return dict(self._learner.evaluate(split))

    def hparams(self) -> dict[str, Any]:
        """See `Progress.hparams`."""
        return {}


class Tuned(Progress):
    """A trial whose gradient-owned values move."""

    def __init__(self, setting: Setting, trial: Assignment, learner: Learner) -> None:
        super().__init__(setting, trial)
        self._inner = cast(Inner, learner)
        self._start(None)

    def _start(self, resume: Any) -> None:
        algorithm = cast(OuterAlgorithm[Any], self.setting.algorithm)
        self._tuning = Tuning(
            self._inner, algorithm, self.setting.budget, seed=self.trial.seed, resume=resume
        )

    @property
    def status(self) -> RunStatus:
        """See `Progress.status`."""
        return self._tuning.run.status

    @property
    def cost(self) -> Cost:
        """See `Progress.cost`."""
        return self._tuning.run.cost

    @property
    def outer_steps(self) -> int:
        """See `Progress.outer_steps`."""
        return self._tuning.run.outer_steps

    def advance(self) -> None:
        """See `Progress.advance`."""
        self._tuning.advance()
        self.reason = self._tuning.run.reason

    def stop(self, status: RunStatus, reason: str) -> None:
        """See `Progress.stop`."""
        self._tuning.run.stop(status, reason)
        self.reason = reason

    def stored(self) -> dict[str, Any]:
        """See `Progress.stored`."""
        return self._tuning.stored()

    def load(self, saved: Mapping[str, Any]) -> None:
        """See `Progress.load`."""
        self._tuning.restore(saved)
        self.reason = self._tuning.run.reason

    def measure(self, split: str) -> dict[str, float] | None:
        """See `Progress.measure`."""
        return self._tuning.evaluate(split)

    def hparams(self) -> dict[str, Any]:
        """See `Progress.hparams`."""
        return {name: value.detach().clone() for name, value in self._tuning.run.hparams.items()}

    def outlook(self) -> tuple[float, str]:
        """See `Progress.outlook`.

        The gain is ‖dF/dz‖ ‖Δz‖ with the last move Δz, an upper bound of the first-order one.
        There is none left where the norm has fallen to 1e-3 of its largest and the hypergradient
        is known to 10 %, or where the outer loss is no lower than before the first step.
        """
        trace = self._tuning.run.trace
        if not trace:
            return 0.0, ""
        norms = [float(row["grad_norm"] or 0.0) for row in trace]
        losses = [float(row["outer_loss"] or 0.0) for row in trace]
        bound, residual = trace[-1]["error_bound"], trace[-1]["residual"]
        error = float(bound) / max(norms[-1], 1e-300) if bound is not None else residual
        largest = max(norms)
        settled = ""
        if largest == 0:
            settled = "the hypergradient is zero"
        elif norms[-1] <= STATIONARY * largest and (error is None or float(error) <= ACCURATE):
            settled = f"stationary: |dF/dz| fell from {largest:.2g} to {norms[-1]:.2g}"
        elif len(losses) > 2 and min(losses[-2:]) > losses[0]:
            settled = f"no gain: the outer loss rose from {losses[0]:.4g} to {losses[-1]:.4g}"
        return norms[-1] * self._last_move(), settled

    def _last_move(self) -> float:
        """‖Δz‖₂ between the values that the weights were trained with and the next ones."""
        run = self._tuning.run
        before, after = (run.inner.space.coordinates(h) for h in (run.hparams, run.inner.hparams))
        return math.hypot(*(float((after[n] - before[n]).detach().norm()) for n in before))

    def files(self) -> dict[str, str]:
        """See `Progress.files`."""
        run = self._tuning.run
        return {
            SCHEDULE: run.schedule.to_json(),
            "schedule.csv": run.schedule.csv(),
            TRACE: json.dumps(run.trace),
        }

    def extra(self) -> dict[str, float]:
        """See `Progress.extra`."""
        trace = self._tuning.run.trace
        if not trace:
            return {}
        first, last = (float(trace[i]["grad_norm"] or 0.0) for i in (0, -1))
        return {"g/norm_first": first, "g/norm_last": last}


def _named(metrics: Mapping[str, float], names: tuple[str, ...], where: str) -> tuple[float, ...]:
    for name in names:
        if name not in metrics and math.isnan(metrics.get("loss", 0.0)):
            raise FloatingPointError(f"val loss is nan {where}")
        if name not in metrics:
            raise ValueError(f"metric must be one of {sorted(metrics)}, but got {name!r}.")
        if isinstance(metrics[name], bool) or not isinstance(metrics[name], int | float):
            kind = type(metrics[name]).__name__
            raise TypeError(
                f"metric {name!r} must be a number, but got {metrics[name]!r} ({kind})."
            )
        if not math.isfinite(metrics[name]):
            raise FloatingPointError(f"val {name} is {metrics[name]} {where}")
    return tuple(float(metrics[name]) for name in names)
