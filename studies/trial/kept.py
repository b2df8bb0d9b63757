"""The best rung of a trial: whose weights and values come out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from studies.messages import Setting
from studies.trial.progress import Progress

__all__ = ["Kept"]


class Kept:
    """A copy of the learner where the validation split was best so far.

    Feasible before infeasible, then by the study's metric, among equals the earlier one.  With
    several metrics, or where the setting keeps the last weights, nothing is copied.

    Args:
        setting: of the study.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._best: dict[str, Any] | None = None

    def look(self, progress: Progress) -> None:
        """Copy the learner if this is its best rung."""
        if self._setting.keep == "last" or len(self._setting.metrics) > 1:
            return
        order = self._order(progress.validated())
        if self._best is None or order < tuple(self._best["order"]):
            self._best = {
                "order": list(order),
                "steps": progress.cost.steps,
                "learner": progress.snapshot(),
            }

    def put_back(self, progress: Progress) -> None:
        """Put the learner at its best rung, if that is not where it is."""
        if self._best is not None and self._best["steps"] != progress.cost.steps:
            progress.go_back(self._best["steps"], self._best["learner"])

    @property
    def learner(self) -> Mapping[str, Any] | None:
        """The learner at its best rung; None without one."""
        return None if self._best is None else self._best["learner"]

    def stored(self) -> dict[str, Any] | None:
        """Return what `load` takes, as plain data."""
        return self._best

    def load(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from what `stored` returned."""
        self._best = None if saved is None else dict(saved)

    def _order(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        limits = self._setting.constraints
        excess = sum(max(0.0, metrics[name] - limit) for name, limit in limits.items())
        return excess, self._setting.signs[0] * metrics[self._setting.metrics[0]]
