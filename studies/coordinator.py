"""The one process that asks, starts, tells and stores the trials of a study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from bilevel.space import Space
from studies.events import Event, Finished, Rung, Started
from studies.executor import Executor, Job
from studies.files import Files
from studies.record import Failure, TrialRecord
from studies.sampling import SeededSampler
from studies.versions import versions

__all__ = ["Coordinator", "TooManyFailuresError", "best_trial"]

MAX_FAILED_AFTER = 10
"""Trials before which no share of failures ends a study."""

MAX_DEATHS = 3
"""Deaths of the process at one checkpoint of a trial before that trial is given up."""


class TooManyFailuresError(RuntimeError):
    """More trials failed than allowed; the message counts the reasons."""


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the complete trial with the best value, among equals the first."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = 1 if study.direction is optuna.study.StudyDirection.MINIMIZE else -1
    return min(done, key=lambda trial: sign * float(trial.value or 0.0), default=None)


@dataclass(frozen=True)
class Coordinator:
    """Runs trials one after another until there are enough; holds no state of its own.

    Whatever ends the process, the database says where the study stands: a trial that is
    RUNNING while nobody holds the lock was left by a dead process and goes on first.

    Attributes:
        study: Optuna's study; only the coordinator writes to it.
        database: its storage.
        files: checkpoints and artifacts.
        sampler: the study's sampler.
        space: asked of the sampler, define-by-run.
        job: ``(trial number, values) -> Job``.
        executor: runs a job.
        max_failed: share of failed trials above which the study stops.
        on_event: called with everything that happens.
    """

    study: optuna.Study
    database: BaseStorage
    files: Files
    sampler: SeededSampler
    space: Space
    job: Callable[[int, Mapping[str, Any]], Job]
    executor: Executor
    max_failed: float
    on_event: Callable[[Event], None]

    def run(self, trials: int) -> None:
        """Go on until the study has `trials` finished trials, or nothing is left to sample.

        Raises:
            TooManyFailuresError: see `max_failed`.
            KeyboardInterrupt: the running trial has stored its checkpoint.
        """
        for left in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._trial(Trial(self.study, left._trial_id), trials, left)
        self._check_failures()
        while self.unfinished(trials):
            self._trial(self.study.ask(), trials, None)
            self._check_failures()

    def unfinished(self, trials: int) -> bool:
        """Whether a study of `trials` trials has any left to run."""
        known = self.study.get_trials(deepcopy=False)
        if any(trial.state is TrialState.RUNNING for trial in known):
            return True
        finished = sum(trial.state.is_finished() for trial in known)
        return finished < trials and not self.study.user_attrs.get("exhausted")

    def _trial(self, trial: Trial, trials: int, left: FrozenTrial | None) -> None:
        """Run a trial to its end; `left` is what a dead process stored of it."""
        values = self.space.suggest(trial)
        job = self.job(trial.number, values)
        self.on_event(Started(trial.number, trials, trial.params, left is not None))
        if left is None or "seed" not in left.user_attrs:
            trial.set_user_attr("seed", job.seed)
            trial.set_user_attr("versions", versions())
        deaths = self._deaths(trial, job, left)
        if deaths >= MAX_DEATHS:
            failure = Failure("died", f"the process died {deaths} times at the same point")
            self._finish(trial, TrialRecord(trial.number, "failed", failure=failure), {})
            return
        reported = set() if left is None else set(left.intermediate_values)

        def report(rung: int, value: float) -> bool:
            if rung not in reported:  # else a rung after the checkpoint, run again
                trial.report(value, rung)
            self.on_event(Rung(trial.number, rung, job.rungs, value))
            return trial.should_prune()

        outcome = self.executor(job, report)
        self._finish(trial, outcome.record, outcome.files)

    def _deaths(self, trial: Trial, job: Job, left: FrozenTrial | None) -> int:
        """Count this start, and return how many before it ended without a newer checkpoint."""
        path = job.checkpoint
        at = path.stat().st_mtime_ns if path.exists() else None
        before = left.user_attrs.get("starts") if left is not None else None
        count = before["count"] if before is not None and before["at"] == at else 0
        trial.set_user_attr("starts", {"at": at, "count": count + 1})
        return int(count)

    def _finish(self, trial: Trial, record: TrialRecord, files: Mapping[str, str]) -> None:
        # Attributes first: a finished trial is immutable.  Killed in between, the trial goes on
        # from its last checkpoint and gets here again with the same numbers.
        for name, value in record.attributes().items():
            trial.set_user_attr(name, value)
        frozen = self.study.get_trials(deepcopy=False)[trial.number]
        self.files.upload(frozen, self.database, files)
        state = {
            "complete": TrialState.COMPLETE,
            "pruned": TrialState.PRUNED,
            "failed": TrialState.FAIL,
        }[record.state]
        value = record.value if state is TrialState.COMPLETE else None
        self.study.tell(trial, value, state)
        if self.sampler.exhausted:
            self.study.set_user_attr("exhausted", True)
        best = best_trial(self.study)
        is_best = best is not None and best.number == trial.number
        stored = self.study.get_trials(deepcopy=False)[trial.number]
        self.files.keep_only(None if best is None else best.number)
        self.on_event(Finished(TrialRecord.of(stored), is_best))

    def _check_failures(self) -> None:
        finished = [t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished()]
        failed = [TrialRecord.of(t) for t in finished if t.state is TrialState.FAIL]
        if len(finished) >= MAX_FAILED_AFTER and len(failed) > self.max_failed * len(finished):
            reasons = Counter(str(record.failure) for record in failed)
            shown = "; ".join(f"{n} × {reason}" for reason, n in reasons.most_common(3))
            raise TooManyFailuresError(
                f"{len(failed)} of {len(finished)} trials failed, more than {self.max_failed:.0%}: "
                f"{shown}."
            )
