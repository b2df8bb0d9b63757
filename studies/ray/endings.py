"""How a trial of Ray Tune ended: by itself, or stopped before its end.

Tune tells a searcher only that a trial is complete.  A trial that ended by itself is one of these:
its last report says so (`studies.ray.trainable.FINISHED`); its function returned, which repeats
the last report; a stop rule of the run holds; the scheduler's own `max_t` is reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.air.constants import TRAINING_ITERATION

from studies.ray.trainable import FINISHED

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

__all__ = ["Endings"]


class Endings:
    """Tells one ending from the other.

    Attributes:
        stop: the stop rule of the run.

    Args:
        scheduler: of the sweep, where it is known.  Without it, a trial whose last report could be
            either is stopped where another trial of the sweep got further.
    """

    def __init__(self, scheduler: TrialScheduler | None = None) -> None:
        self.scheduler = scheduler
        self.stop: Any = None
        self._seen: dict[str, int] = {}

    def saw(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A report after which the trial was to go on."""
        self._seen[trial_id] = int(result.get(TRAINING_ITERATION, 0))

    def why_stopped(self, trial_id: str, result: Mapping[str, Any]) -> str | None:
        """Return who stopped a trial before its end, in words; None where it ended by itself."""
        at = int(result.get(TRAINING_ITERATION, 0))
        if result.get(FINISHED):
            return None
        if self._seen.get(trial_id) == at:  # a decision to stop would not have shown us the report
            return None if result.get("done") else f"stopped from outside at iteration {at}"
        rules = self.stop if isinstance(self.stop, Mapping) else {}
        if any(name in result and result[name] >= top for name, top in rules.items()):
            return None
        if self.scheduler is None:
            own = at >= max(self._seen.values(), default=0)
        else:
            top, unit = _limit(self.scheduler)
            own = top is None or result.get(unit, at) >= top
        return None if own else f"stopped by the scheduler at iteration {at}"

    def state_dict(self) -> dict[str, Any]:
        """Return what a restored searcher needs, as plain data."""
        return {"seen": dict(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._seen = dict(state["seen"])


def _limit(scheduler: TrialScheduler) -> tuple[float | None, str]:
    """The end of a trial by a scheduler, and its unit; None where it stops none."""
    from ray.tune.schedulers import (
        AsyncHyperBandScheduler,
        FIFOScheduler,
        HyperBandScheduler,
        MedianStoppingRule,
        PopulationBasedTraining,
    )

    if isinstance(scheduler, AsyncHyperBandScheduler):
        return scheduler._max_t, scheduler._time_attr
    if isinstance(scheduler, HyperBandScheduler):
        return scheduler._max_t_attr, scheduler._time_attr
    if isinstance(scheduler, MedianStoppingRule):
        return float("inf"), scheduler._time_attr
    if isinstance(scheduler, PopulationBasedTraining) or type(scheduler) is FIFOScheduler:
        return None, TRAINING_ITERATION
    return float("inf"), TRAINING_ITERATION
