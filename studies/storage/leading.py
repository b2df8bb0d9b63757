"""Which trials of an Optuna study lead: its best one, or the front of several objectives."""

from __future__ import annotations

from collections.abc import Iterable

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from studies.storage.all_trials import all_trials

__all__ = ["best_among", "best_trial", "front_trials", "signs"]


def signs(study: optuna.Study) -> tuple[int, ...]:
    """Return 1 for each objective that is minimized and −1 for each that is maximized."""
    return tuple(1 if d is StudyDirection.MINIMIZE else -1 for d in study.directions)


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the feasible complete trial with the best (first) value, among equals the first."""
    return best_among(all_trials(study), signs(study)[0])


def best_among(trials: Iterable[FrozenTrial], sign: int) -> FrozenTrial | None:
    """`best_trial` of trials that were read before."""
    done = [
        trial
        for trial in trials
        if trial.state is TrialState.COMPLETE
        and "imported" not in trial.user_attrs
        and all(excess <= 0 for excess in trial.constraints.values())
    ]
    return min(done, key=lambda trial: sign * float((trial.values or [0.0])[0]), default=None)


def front_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the study's own feasible complete trials that no other one dominates, in order."""
    return [trial for trial in study.best_trials if "imported" not in trial.user_attrs]
