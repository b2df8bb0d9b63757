"""The study behind a sweep of Ray Tune: made when all is known, found again after a restore."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, Trial

from studies.ray.study import (
    TRIAL_ID,
    SpaceLike,
    agree,
    aims,
    known_to_tune,
    open_study,
    orphans,
)
from studies.storage.all_trials import all_trials
from studies.storage.database import open_storage, parse_storage
from studies.storage.trials_json import trial_from_json, trial_to_json

__all__ = ["STRICT", "Sweep"]

STRICT = "TUNE_DISABLE_STRICT_METRIC_CHECKING"
"""Environment variable without which Tune ends a sweep where one trial forgets the metric."""


class Sweep:
    """An Optuna study, and which of its trials is which of Tune.

    Attributes:
        name: of the study.
        space: what is asked for; None until it is known.
        metrics: what is optimized; empty until that is known.
        modes: "min" or "max" for each metric.
        numbers: number of a trial in the study by Tune's id.

    Args:
        name: of the study; None for a unique one.
        storage: database URL, path to a SQLite file or Optuna storage; None for in memory.
        sampler: of the study.
        space: see the attribute.
        points: configs to try first.
        rewards: their values where they are known.
    """

    def __init__(
        self,
        name: str | None,
        storage: BaseStorage | str | os.PathLike[str] | None,
        sampler: BaseSampler,
        space: SpaceLike | None,
        points: Sequence[Mapping[str, Any]],
        rewards: Sequence[float | Sequence[float]] | None,
    ) -> None:
        self.name = name or f"ray-{uuid.uuid4().hex[:12]}"
        self.space = space
        self.metrics: tuple[str, ...] = ()
        self.modes: tuple[str, ...] = ()
        self.numbers: dict[str, int] = {}
        self._storage = storage if storage is None or isinstance(storage, BaseStorage) else None
        self._url = None if storage is None or self._storage else parse_storage(storage)  # type: ignore[arg-type]
        self._sampler, self._points, self._rewards = sampler, list(points), rewards
        self._about: dict[str, str] = {}
        self._orphans: list[int] = []
        self._study: optuna.Study | None = None

    def aim(self, metric: Any, mode: Any) -> None:
        """Learn what is optimized.

        Raises:
            ValueError: metric and mode do not fit, or were others before.
        """
        metrics, modes = aims(metric, mode)
        if self.metrics and (metrics, modes) != (self.metrics, self.modes):
            raise ValueError(
                f"metric: the searcher has {self.metrics} {self.modes}, but TuneConfig has "
                f"{metrics} {modes}."
            )
        self.metrics, self.modes = metrics, modes

    def describe(self, about: Mapping[str, str]) -> None:
        """Learn what the study is about: user attributes of it, such as the learner's name.

        Raises:
            MismatchError: the study is open and is about something else.
        """
        self._about = dict(about)
        if self._study is not None:
            agree(self._study, self._about)

    @property
    def study(self) -> optuna.Study:
        """The study; made, or opened, at first use.

        Raises:
            RuntimeError: metric, mode or space are not known.
            MismatchError: the study exists with other directions, or is about something else.
        """
        if self._study is None:
            self._study = self._open()
        return self._study

    def _open(self) -> optuna.Study:
        if not self.metrics or self.space is None:
            raise RuntimeError(
                "StudySearcher needs a space, a metric and a mode: give them to it, or use "
                "studies.ray.tuner; Tune passes on those of TuneConfig only with a param_space."
            )
        os.environ.setdefault(STRICT, "1")
        if self._storage is None:
            self._storage = InMemoryStorage() if self._url is None else open_storage(self._url)
        return open_study(
            self.name,
            self._storage,
            self._sampler,
            self.space,
            (self.metrics, self.modes),
            self._about,
            self._points,
            self._rewards,
        )

    # Trials.

    def ask(self, trial_id: str) -> Trial:
        """Return the trial of an id; after a restore, those that Tune forgot come first."""
        study, known = self.study, self.number(trial_id)
        if known is None and self._orphans:
            known = self._orphans.pop(0)
        # A trial that a killed process asked keeps its draws; the rest of them are made again.
        trial = study.ask() if known is None else self.trial(known)
        self.numbers[trial_id] = trial.number
        return trial

    def number(self, trial_id: str) -> int | None:
        """Number of the trial of an id; the database knows those that a snapshot does not."""
        if trial_id not in self.numbers:
            for frozen in all_trials(self.study):
                if TRIAL_ID in frozen.user_attrs:
                    self.numbers.setdefault(frozen.user_attrs[TRIAL_ID], frozen.number)
        return self.numbers.get(trial_id)

    def frozen(self, number: int) -> FrozenTrial:
        """Return a trial as it is stored."""
        return all_trials(self.study)[number]

    def trial(self, number: int) -> Trial:
        """Return a trial to write to."""
        return Trial(self.study, self.frozen(number)._trial_id)

    # Storing.

    def state(self) -> dict[str, Any]:
        """Return plain data; the trials of a study in memory are in it."""
        trials = None
        if self._study is not None and isinstance(self._storage, InMemoryStorage):
            trials = [trial_to_json(t) for t in all_trials(self._study)]
        return {
            "study": self.name,
            "metrics": self.metrics,
            "modes": self.modes,
            "numbers": self.numbers,
            "trials": trials,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned; trials that it does not know are asked first.

        Raises:
            ValueError: the study of another searcher.
        """
        self.name, self._study = state["study"], None
        self.metrics = self.modes = ()
        if state["metrics"]:
            self.aim(state["metrics"], state["modes"])
        if state["trials"] is not None:
            self._storage = InMemoryStorage()
            self._points, self._rewards = [], None  # they are among the trials
            for trial in state["trials"]:
                self.study.add_trial(trial_from_json(trial))
        self.numbers = dict(state["numbers"])
        self._find_orphans(set())

    def load_snapshot(self, folder: Path) -> None:
        """Look up in Tune's own snapshot which trials it knows."""
        known = known_to_tune(folder)
        if known is not None:
            self._find_orphans(known)

    def _find_orphans(self, known: set[str]) -> None:
        if self.metrics and self.space is not None:
            self._orphans = orphans(self.study, known | set(self.numbers))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_study"] = None
        if self._url is not None:
            state["_storage"] = None
            state["_url"] = self._url.set(password=None) if self._url.password else self._url
        elif isinstance(self._storage, InMemoryStorage):
            state["_storage"] = None  # `state` has its trials
        return state
