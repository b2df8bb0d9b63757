"""All trials of a study, read fast."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial

from studies.storage.collector import paused

__all__ = ["all_trials"]


def all_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return all trials in order; they are the storage's own and may not be changed."""
    with paused():
        return study.get_trials(deepcopy=False)
