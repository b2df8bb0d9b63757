"""A trial whose gradient-owned values move."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from adapters.learner import Learner
from bilevel.algorithm import OuterAlgorithm
from bilevel.checkpoint import copy
from bilevel.inner import Inner
from bilevel.metrics import Cost, RunStatus
from bilevel.tuning import Tuning
from studies.messages import SCHEDULE, TRACE, Assignment, Setting
from studies.trial.progress import Progress

__all__ = ["Tuned"]

STATIONARY = 1e-3
"""Hypergradient norm, relative to the largest of the trial, at which it has nothing to give."""

PATIENT = 10
"""Outer steps before which an outer loss may rise: weights change more than hyperparameters yet."""

SURE = 3
"""The same with hypergradients of an inner solution whose error is known: weights stay there."""

ACCURATE = 0.1
"""Largest relative error of a hypergradient that counts as known."""


class Tuned(Progress):
    """A trial whose gradient-owned values move."""

    def __init__(self, setting: Setting, trial: Assignment, learner: Learner) -> None:
        super().__init__(setting, trial)
        self._inner = cast(Inner, learner)
        self._at: Mapping[str, Any] | None = None
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

    def snapshot(self) -> dict[str, Any]:
        """See `Progress.snapshot`."""
        return {"inner": copy(self._inner.state_dict()), "hparams": copy(self.hparams())}

    def put(self, snapshot: Mapping[str, Any]) -> None:
        """See `Progress.put`."""
        self._inner.load_state_dict(copy(snapshot["inner"]))
        self._at = copy(snapshot["hparams"])

    def measure(self, split: str) -> dict[str, float] | None:
        """See `Progress.measure`."""
        return self._tuning.evaluate(split, self._at)

    def hparams(self) -> dict[str, Any]:
        """See `Progress.hparams`."""
        values = self._tuning.run.hparams if self._at is None else self._at
        return {name: value.detach().clone() for name, value in values.items()}

    def improved(self) -> bool:
        """See `Progress.improved`: the outer loss was below that before the first outer step."""
        losses = [float(row["outer_loss"] or 0.0) for row in self._tuning.run.trace]
        return len(losses) > 1 and min(losses[1:]) < losses[0]

    def outlook(self) -> tuple[float, str]:
        """See `Progress.outlook`.

        The gain is ‖dF/dz‖ ‖Δz‖ with the last move Δz, an upper bound of the first-order one.
        There is none left where the norm has fallen to 1e-3 of its largest and the hypergradient
        is known to 10 %, or where the outer loss, in the later half of at least ten steps (three,
        if the hypergradient is known), was never as low as before the first.
        """
        trace = self._tuning.run.trace
        if not trace:
            return 0.0, ""
        norms = [float(row["grad_norm"] or 0.0) for row in trace]
        losses = [float(row["outer_loss"] or 0.0) for row in trace]
        bound, residual = trace[-1]["error_bound"], trace[-1]["residual"]
        error = float(bound) / max(norms[-1], 1e-300) if bound is not None else residual
        known = error is not None and float(error) <= ACCURATE
        patience = SURE if known else PATIENT
        largest = max(norms)
        settled = ""
        if largest == 0:
            settled = "the hypergradient is zero"
        elif norms[-1] <= STATIONARY * largest and (error is None or known):
            settled = f"stationary: |dF/dz| fell from {largest:.2g} to {norms[-1]:.2g}"
        elif len(losses) >= patience and min(losses[len(losses) // 2 :]) > losses[0]:
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
