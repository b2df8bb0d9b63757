"""A trial in which nothing moves but the weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from adapters.learner import Learner
from bilevel.checkpoint import copy
from bilevel.metrics import Cost, RunStatus
from studies.messages import Assignment, Setting
from studies.trial.progress import Progress

__all__ = ["Plain"]


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

    def snapshot(self) -> dict[str, Any]:
        """See `Progress.snapshot`."""
        return dict(copy(self._learner.state_dict()))

    def put(self, snapshot: Mapping[str, Any]) -> None:
        """See `Progress.put`."""
        self._learner.load_state_dict(copy(dict(snapshot)))

    def measure(self, split: str) -> dict[str, float] | None:
        """See `Progress.measure`."""
        return dict(self._learner.evaluate(split))

    def hparams(self) -> dict[str, Any]:
        """See `Progress.hparams`."""
        return {}
