"""`Study`: trials of one learner on one task, asked of a sampler, run, told and stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from adapters import registry, tasks
from adapters.learner import Learner
from adapters.tasks import Task
from bilevel.algorithm import OuterAlgorithm
from bilevel.budget import Budget
from bilevel.checks import integer
from bilevel.schedule import Schedule
from bilevel.space import Space
from studies.agreement import agree, agree_on_run, settings
from studies.coordinator import Coordinator, best_trial
from studies.events import Event
from studies.executor import SCHEDULE, Job, in_process, rehearse, restore
from studies.files import Files
from studies.record import TrialRecord
from studies.sampling import derive_seed, make_pruner, make_sampler
from studies.storage import (
    check_folder,
    coordinator_lock,
    default_folder,
    masked,
    open_storage,
    parse_storage,
)

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Study"]


class Study:
    """Trials of one learner on one task, stored in a database that stock Optuna reads.

    Sampler-owned hyperparameters are asked of an Optuna sampler once per trial; gradient-owned
    ones move inside the trial, by the outer algorithm.  Where the gradient owns none, a trial is
    plain training.  A study that is opened again goes on: the same settings and the same numbers
    as without the break, whatever ended the process.

    Args:
        name: of the study, unique in its storage.
        learner: registry name or `Learner` class.
        task: registry name or `Task`.
        storage: database URL, or path to a SQLite file.
        space: the hyperparameters and their owners.  Default: the learner's.
        algorithm: moves the gradient-owned hyperparameters; needed where there are any.
        sampler: name (see `studies.sampling.SAMPLERS`) or Optuna sampler.  Default: "tpe".
        pruner: name (see `studies.sampling.PRUNERS`) or Optuna pruner, asked at rungs.
            Default: "none".
        direction: of the objective.
        metric: the objective: a name among the metrics of the validation split.
        seed: decides the sampler's draws and every trial's seed.
        folder: for checkpoints, artifacts and the lock.  Default: ``NAME-files`` beside
            ``NAME.db``.

    Raises:
        ValueError: unknown learner, task, sampler, pruner or direction; an algorithm that is
            missing, or given where the gradient owns nothing.
        StorageError: the storage or the folder cannot be used.
        MismatchError: there is a study of this name with other settings.
    """

    def __init__(
        self,
        name: str,
        learner: str | type[Learner],
        task: str | Task,
        storage: str | PathLike[str] = "sqlite:///bilevel.db",
        *,
        space: Space | None = None,
        algorithm: OuterAlgorithm[Any] | None = None,
        sampler: BaseSampler | str | None = None,
        pruner: BasePruner | str | None = None,
        direction: Literal["minimize", "maximize"] = "minimize",
        metric: str = "loss",
        seed: int = 0,
        folder: str | PathLike[str] | None = None,
    ) -> None:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"name must be a text that is not empty, but got {name!r}.")
        if direction not in ("minimize", "maximize"):
            raise ValueError(f"direction must be 'minimize' or 'maximize', but got {direction!r}.")
        self.name = name
        self.learner = registry.get(learner) if isinstance(learner, str) else learner
        self.task = tasks.get(task) if isinstance(task, str) else task
        self.space = self.learner.space if space is None else space
        self.algorithm = algorithm
        self.direction = direction
        self.metric = metric
        self.seed = integer("seed", seed, minimum=0)
        _check_owners(self.space, algorithm)
        self._sampler = make_sampler(sampler, self.seed)
        url = parse_storage(storage)
        self.storage = masked(url)
        root = default_folder(url) if folder is None else Path(folder)
        self._database = open_storage(url)
        check_folder(root, "the study's folder")
        self._files = Files(root, name)
        self._files.make()
        self._study = optuna.create_study(
            study_name=name,
            storage=self._database,
            sampler=self._sampler,
            pruner=make_pruner(pruner),
            direction=direction,
            load_if_exists=True,
        )
        agree(
            self._study,
            self.storage,
            direction,
            settings(self.learner.name, self.task, self.space, algorithm, metric, self.seed),
        )

    # Reading.

    @property
    def optuna(self) -> optuna.Study:
        """The study as Optuna's object, for its plots, importances and samplers."""
        return self._study

    @property
    def trials(self) -> list[TrialRecord]:
        """All trials in order."""
        return [TrialRecord.of(trial) for trial in self._study.get_trials(deepcopy=False)]

    @property
    def best(self) -> TrialRecord:
        """The complete trial with the best value; among equals the first.

        Raises:
            ValueError: no trial is complete.
        """
        best = best_trial(self._study)
        if best is None:
            raise ValueError(f"study {self.name!r} has no complete trial yet.")
        return TrialRecord.of(best)

    def schedule(self, number: int | None = None) -> Schedule | None:
        """Return the history of the gradient-owned values of a trial, by default of the best.

        None for a trial in which the gradient owned nothing, or that did not finish.
        """
        text = self.artifact(SCHEDULE, number)
        return None if text is None else Schedule.from_json(text)

    def artifact(self, name: str, number: int | None = None) -> str | None:
        """Return the text of an artifact of a trial, by default of the best; None without one.

        Raises:
            ValueError: there is no such trial.
        """
        number = self.best.number if number is None else number
        trials = self._study.get_trials(deepcopy=False)
        if not 0 <= number < len(trials):
            raise ValueError(
                f"study {self.name!r} has {len(trials)} trials, but not trial {number}."
            )
        return self._files.download(trials[number], self._database, name)

    def trained(self) -> Learner:
        """Return the learner of the best trial, trained, at its final hyperparameters.

        Raises:
            ValueError: no trial is complete.
            FileNotFoundError: the study's folder does not hold its final state any more.
        """
        best, run = self.best, self._study.user_attrs["run"]
        values = self.space.values_from_params(best.params)
        budget = Budget(**{k: v for k, v in run["budget"].items() if k != "type"})
        return restore(self._job(best.number, values, budget, run["rungs"]))

    def table(self) -> Table:
        """Return the trials as a table for a terminal (`rich.print`)."""
        from studies.tables import trials_table

        return trials_table(self)

    def report(self, folder: str | PathLike[str]) -> Path:
        """Write ``report.html``, one self-contained page, and ``report.png`` into a folder.

        Returns:
            The path of the page.

        Raises:
            StorageError: the folder cannot be written to.
        """
        from studies.report import study_report

        return study_report(self, Path(folder))

    # Running.

    def enqueue(self, values: Mapping[str, Any]) -> None:
        """Have the next trial use these sampler-owned values, the others at their default.

        Raises:
            ValueError: an unknown name, or a value outside its domain.
        """
        self._study.enqueue_trial(self.space.to_params(values))

    def run(
        self,
        trials: int,
        budget: Budget | int,
        *,
        rungs: int = 10,
        max_failed: float = 0.5,
        on_event: Callable[[Event], None] | None = None,
        checkpoint_seconds: float = 10.0,
    ) -> Self:
        """Run until the study has a number of trials.

        A trial that an earlier process left unfinished goes on from its checkpoint first.
        Ctrl-C finishes the current step, stores a checkpoint and raises KeyboardInterrupt.

        Args:
            trials: of the study in total, those of earlier calls included.
            budget: of each trial; a bare integer means training steps.
            rungs: how often a trial reports its value, equally spaced over its budget.
            max_failed: share of failed trials (of at least 10) above which the study stops.
            on_event: called with each `studies.events.Event`.
            checkpoint_seconds: least wall time between two checkpoints of a trial.

        Raises:
            LockedError: another process runs this study.
            MismatchError: earlier trials had another budget or other rungs.
            TooManyFailuresError: see `max_failed`.
            TypeError: an algorithm is to tune a learner that has no pure losses.
            ValueError: the learner refuses the task, or has no such metric.
            KeyboardInterrupt: the study can be run again to go on.
        """
        integer("trials", trials, minimum=1)
        integer("rungs", rungs, minimum=1)
        if not 0 <= max_failed <= 1:
            raise ValueError(f"max_failed must be in [0, 1], but got {max_failed!r}.")
        budget = Budget.of(budget)

        def job(number: int, values: Mapping[str, Any]) -> Job:
            return self._job(number, values, budget, rungs, checkpoint_seconds)

        coordinator = Coordinator(
            study=self._study,
            database=self._database,
            files=self._files,
            sampler=self._sampler,
            space=self.space,
            job=job,
            executor=in_process,
            max_failed=max_failed,
            on_event=on_event or (lambda event: None),
        )
        with coordinator_lock(self._files.study, self.name):
            agree_on_run(self._study, self.storage, budget, rungs)
            if coordinator.unfinished(trials):
                rehearse(job(0, self.space.defaults()))
                coordinator.run(trials)
        return self

    def _job(
        self,
        number: int,
        values: Mapping[str, Any],
        budget: Budget,
        rungs: int,
        checkpoint_seconds: float = 0.0,
    ) -> Job:
        return Job(
            number=number,
            seed=derive_seed(self.seed, "trial", number),
            learner=self.learner,
            task=self.task,
            space=self.space,
            values=values,
            algorithm=self.algorithm,
            budget=budget,
            rungs=rungs,
            metric=self.metric,
            checkpoint=self._files.checkpoint(number),
            checkpoint_seconds=checkpoint_seconds,
        )


def _check_owners(space: Space, algorithm: OuterAlgorithm[Any] | None) -> None:
    if space.grad and algorithm is None:
        raise ValueError(
            f"algorithm: the gradient owns {list(space.grad)}, so an outer algorithm is needed, "
            "such as Descent(Unrolled(steps=5)); or give them to the sampler with space.own(...)."
        )
    if algorithm is not None and not space.grad:
        raise ValueError(
            f"algorithm: the gradient owns none of {list(space)}, but got {algorithm!r}."
        )
