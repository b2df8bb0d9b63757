"""A trial between its steps: plain training, or training with hypergradients, seen alike."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bilevel.metrics import Cost, RunStatus
from studies.messages import Assignment, Outcome, Setting
from studies.record import Failure, TrialRecord, as_metrics, as_numbers

__all__ = ["Progress"]

_STATES: Mapping[RunStatus, Any] = {RunStatus.RUNNING: "running", RunStatus.PRUNED: "pruned"}


class Progress(ABC):
    """A trial in one place: it advances by a step, and knows what is stored of it."""

    def __init__(self, setting: Setting, trial: Assignment) -> None:
        self.setting, self.trial = setting, trial
        self.reason = ""
        self._val: tuple[Cost, dict[str, float]] | None = None
        self._back: int | None = None

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
    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the weights and of the values that they were trained with."""

    @abstractmethod
    def put(self, snapshot: Mapping[str, Any]) -> None:
        """Put the learner at a snapshot; the trial does not go on from there."""

    @abstractmethod
    def measure(self, split: str) -> dict[str, float] | None:
        """Return the metrics of a split; None where there is no such split."""

    @abstractmethod
    def hparams(self) -> dict[str, Any]:
        """Return the gradient-owned values; empty where there are none."""

    def go_back(self, steps: int, snapshot: Mapping[str, Any]) -> None:
        """Let what comes out be a snapshot, of so many training steps."""
        self.put(snapshot)
        self._back, self._val = steps, None

    def improved(self) -> bool:
        """Whether other trials may start from the gradient-owned values."""
        return True

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
        return _named(self.validated(), self.setting.metrics, where)

    def validated(self) -> dict[str, float]:
        """Return the metrics of the validation split, measured once between two steps."""
        if self._val is None or self._val[0] != self.cost:
            self._val = self.cost, as_metrics(self.measure("val") or {})
        return self._val[1]

    def failed(self, failure: Failure) -> TrialRecord:
        """Return the record of a trial that failed: what it cost, and why."""
        return TrialRecord(self.trial.number, "failed", cost=self.cost, failure=failure)

    def outcome(self, record: TrialRecord) -> Outcome:
        """Return a record with everything that is stored beside it."""
        passed_on = record.state != "failed" and self.improved()
        values = self.hparams() if passed_on else {}
        # The coordinator may have no such device.
        here = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in values.items()}
        return Outcome(record, self.files(), here)

    def record(self, *, evaluate_test: bool) -> TrialRecord:
        """Return the record of the trial as it is now."""
        if self.status is RunStatus.DIVERGED:
            return self.failed(Failure("diverged", self.reason))
        val = self.validated()
        test = as_metrics(self.measure("test") or {}) if evaluate_test else {}
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
            return self.failed(Failure("not finite", str(error)))
        return TrialRecord(
            self.trial.number,
            _STATES.get(self.status, "complete"),
            values=values,
            hparams=as_numbers({**self.trial.values, **self.hparams()}),
            metrics={**named, **self.extra()},
            constraints={n: v - limits[n] for n, v in zip(limits, limited, strict=True)},
            cost=self.cost,
            seed=self.trial.seed,
            status=self.status.value,
            at=self._back,
        )


def _named(metrics: Mapping[str, float], names: tuple[str, ...], where: str) -> tuple[float, ...]:
    for name in names:
        if name not in metrics and math.isnan(metrics.get("loss", 0.0)):
            raise FloatingPointError(f"val loss is nan {where}")
        if name not in metrics:
            raise ValueError(f"metric must be one of {sorted(metrics)}, but got {name!r}.")
        if not math.isfinite(metrics[name]):
            raise FloatingPointError(f"val {name} is {metrics[name]} {where}")
    return tuple(float(metrics[name]) for name in names)
