"""What can be read of a study, the same for one that is run here and for one in a folder."""

from __future__ import annotations

from abc import ABC, abstractmethod

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from bilevel.schedule import Schedule
from bilevel.space import Space
from studies.messages import SCHEDULE
from studies.record import TrialRecord
from studies.storage.all_trials import all_trials
from studies.storage.files import Files
from studies.storage.leading import best_trial, front_trials

__all__ = ["NoResultError", "Readable", "best_of"]


class NoResultError(ValueError):
    """No trial is complete, and within the constraints."""


def best_of(study: optuna.Study) -> TrialRecord | None:
    """Return the best trial; None without one, or where there are several objectives."""
    best = best_trial(study) if len(study.directions) == 1 else None
    return None if best is None else TrialRecord.of(best)


class Readable(ABC):
    """A study as figures, tables and reports see it.

    Attributes:
        name: of the study.
        database: its storage.
        files: checkpoints and artifacts.
    """

    name: str
    database: RDBStorage
    files: Files

    @property
    @abstractmethod
    def space(self) -> Space:
        """The hyperparameters and their owners."""

    @property
    @abstractmethod
    def optuna(self) -> optuna.Study:
        """The study as Optuna's object, for its plots, importances and samplers."""

    @property
    def best(self) -> TrialRecord:
        """The feasible complete trial with the best value; among equals the first.

        Raises:
            NoResultError: no trial is complete and feasible.
            ValueError: there are several objectives.
        """
        count = len(self.optuna.directions)
        if count > 1:
            raise ValueError(
                f"study {self.name!r} has {count} objectives and no best trial; use `front`, or "
                "`bilevel study show DIR --front`."
            )
        best = best_of(self.optuna)
        if best is None:
            raise self.no_result()
        return best

    def no_result(self) -> NoResultError:
        """Return why no trial leads: none is complete, or none within the constraints."""
        ended = any(record.state == "complete" for record in self.trials)
        limits = " within the constraints" if ended else ""
        return NoResultError(f"study {self.name!r} has no complete trial{limits} yet.")

    @property
    def trials(self) -> list[TrialRecord]:
        """All trials in order."""
        return [TrialRecord.of(trial) for trial in all_trials(self.optuna)]

    @property
    def front(self) -> list[TrialRecord]:
        """The feasible complete trials that no other one dominates, in order."""
        return [TrialRecord.of(trial) for trial in front_trials(self.optuna)]

    def trial(self, number: int) -> FrozenTrial:
        """Return a trial as Optuna stores it.

        Raises:
            ValueError: there is no such trial.
        """
        trials = all_trials(self.optuna)
        if not 0 <= number < len(trials):
            have = f"trials 0 to {len(trials) - 1}" if trials else "no trials yet"
            raise ValueError(f"study {self.name!r} has {have}, but not trial {number}.")
        return trials[number]

    def artifacts(self, number: int) -> dict[str, str]:
        """Return file name -> id of a trial's artifacts; of several of a name the latest."""
        return self.files.artifacts_of(self.trial(number), self.database)

    def artifact(self, name: str, number: int | None = None) -> str | None:
        """Return the text of an artifact of a trial, by default of the best; None without one.

        Raises:
            ValueError: there is no such trial.
        """
        found = self.artifacts(self.best.number if number is None else number).get(name)
        return None if found is None else self.files.read(found)

    def schedule(self, number: int | None = None) -> Schedule | None:
        """Return the history of the gradient-owned values of a trial, by default of the best.

        None for a trial in which the gradient owned nothing, or that did not finish.
        """
        text = self.artifact(SCHEDULE, number)
        return None if text is None else Schedule.from_json(text)

    def owner(self, record: TrialRecord, name: str) -> str:
        """Return who moved a hyperparameter in a trial."""
        if name not in self.space:
            return "sampler"
        owner = self.space.owner(name)
        return "sampler" if owner == "grad" and record.by == "sampler" else owner
