"""`Study`: trials of one learner on one task, asked of a sampler, run, told and stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import Trial

from adapters import registry, tasks
from adapters.learner import Learner
from adapters.tasks import Task
from bilevel.algorithm import OuterAlgorithm
from bilevel.budget import Budget
from bilevel.checks import integer, real
from bilevel.space import Space
from studies.arguments import Direction, check_run, directions, metric_names
from studies.events import Event, Stalled
from studies.executors.config import ExecutorConfig, ExecutorName, executor_config
from studies.messages import Assignment, Keep, Setting
from studies.runner.agreement import agree, agree_on_run, settings
from studies.runner.bracket import Brackets
from studies.runner.coordinator import Coordinator, Limits
from studies.runner.interrupt import deferred_interrupt
from studies.runner.ledger import Ledger
from studies.runner.schedulers import Scheduler
from studies.runner.strategy import choose_scheduler, first_points, fitted
from studies.runner.warm import warm_values
from studies.sampling.imports import Rows, observations
from studies.sampling.samplers import derive_seed, make_pruner, make_sampler
from studies.sampling.spaces import check_discrete, check_owners, samplable, sampled_space
from studies.storage.all_trials import all_trials
from studies.storage.database import (
    check_folder,
    default_folder,
    masked,
    open_storage,
    parse_storage,
)
from studies.storage.files import Files
from studies.storage.leading import signs
from studies.storage.locks import coordinator_lock
from studies.trial.run import rehearse, restore
from studies.views.readable import Readable

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Study"]


class Study(Readable):
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
        sampler: name (see `studies.sampling.samplers.SAMPLERS`) or Optuna sampler.  Default: "tpe".
        pruner: name (see `studies.sampling.samplers.PRUNERS`) or Optuna pruner, asked at rungs.
            Default: "none".
        direction: of the objective, or one for each.  Default: "minimize", but an accuracy needs
            one.
        metric: the objective: a name among the metrics of the validation split, or several.
        constraints: metric of the validation split -> its largest feasible value.
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
        direction: Direction | Sequence[Direction] | None = None,
        metric: str | Sequence[str] = "loss",
        constraints: Mapping[str, float] | None = None,
        seed: int = 0,
        folder: str | PathLike[str] | None = None,
    ) -> None:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"name must be a text that is not empty, but got {name!r}.")
        self.metrics = metric_names(metric)
        self.directions = directions(direction, self.metrics)
        self.constraints = {
            name: real(f"constraints[{name!r}]", limit)
            for name, limit in (constraints or {}).items()
        }
        self.name = name
        self.learner = registry.get(learner) if isinstance(learner, str) else learner
        self.task = tasks.get(task) if isinstance(task, str) else task
        self._space = self.learner.space if space is None else space
        self.algorithm = algorithm
        self.seed = integer("seed", seed, minimum=0)
        if self.seed >= 2**32:  # a sampler's generator takes no more
            raise ValueError(f"seed must be below 2**32, but got {seed}.")
        check_owners(self.space, algorithm)
        self._sampler, self._sampler_is_default = make_sampler(sampler, self.seed), sampler is None
        if str(self._sampler) == "BruteForceSampler":
            check_discrete(self.space)
        url = parse_storage(storage)
        self.storage = masked(url)
        root = default_folder(url) if folder is None else Path(folder)
        self.database = open_storage(url)
        check_folder(root, "the study's folder")
        self.files = Files(root, name)
        self.files.make()
        self._study = optuna.create_study(
            study_name=name,
            storage=self.database,
            sampler=self._sampler,
            pruner=make_pruner(pruner),
            directions=self.directions,
            load_if_exists=True,
        )
        agree(self._study, self.storage, self.directions, settings(self, url))

    # Reading.

    @property
    def space(self) -> Space:
        """The hyperparameters and their owners."""
        return self._space

    @property
    def optuna(self) -> optuna.Study:
        """The study as Optuna's object, for its plots, importances and samplers."""
        return self._study

    def trained(self) -> Learner:
        """Return the learner of the best trial, trained, at its final hyperparameters.

        Raises:
            ValueError: no trial is complete.
            FileNotFoundError: the study's folder does not hold its final state any more.
        """
        best, run = self.best, self._study.user_attrs["run"]
        gradient = best.by != "sampler" and self.algorithm is not None
        space = self.space if best.by == "gradient" else sampled_space(self.space)
        values = space.values_from_params(best.params)
        budget = Budget(**{k: v for k, v in run["budget"].items() if k != "type"})
        setting = self._setting(budget, tuple(run["rungs"]), run["keep"])
        return restore(setting, self._assignment(best.number, values, gradient))

    def table(self) -> Table:
        """Return the trials as a table for a terminal (`rich.print`)."""
        from studies.views.tables import trials_table

        return trials_table(self)

    def report(self, folder: str | PathLike[str]) -> Path:
        """Write ``report.html``, one self-contained page, and a PNG of each of its figures.

        Returns:
            The path of the page.

        Raises:
            StorageError: the folder cannot be written to.
            ValueError: no trial is complete.
        """
        from studies.figures.report import study_report

        return study_report(self, Path(folder))

    # Running.

    def enqueue(self, values: Mapping[str, Any]) -> None:
        """Have the next trial use these sampler-owned values, the others at their default.

        Raises:
            ValueError: an unknown name, or a value outside its domain.
        """
        self._study.enqueue_trial(self.space.to_params(values))

    def learn(self, source: Readable | Rows, name: str | None = None) -> int:
        """Add what is known from elsewhere: the sampler learns from it, nothing is run again.

        Args:
            source: another study, perhaps of a narrower space; a CSV file; or rows: a mapping for
                each, with a value for each sampled name and each metric.  Names that only the
                source has are refused.
            name: of the source; by default that of the study or the file.  A source that was
                added before is not added again.

        Returns:
            The number of trials that were added.

        Raises:
            ValueError: a row that does not fit; names it, and nothing is added.
        """
        if name is None:
            name = source.name if isinstance(source, Readable) else "table"
            if isinstance(source, str | PathLike):
                name = Path(source).name
        trials = all_trials(self._study)
        if any(trial.user_attrs.get("imported") == name for trial in trials):
            return 0
        rows = source.optuna if isinstance(source, Readable) else source
        space = sampled_space(self.space) if samplable(self.space) else self.space
        found = observations(rows, space, self.metrics, name)
        with coordinator_lock(self.files.study, self.name, self.database):
            self._study.add_trials(found)
        return len(found)

    def run(
        self,
        trials: int,
        budget: Budget | int,
        *,
        rungs: int = 10,
        scheduler: Scheduler | Literal["auto", "fifo", "halving"] = "auto",
        total: Budget | None = None,
        workers: int | None = None,
        executor: ExecutorConfig | ExecutorName = "auto",
        trial_seconds: float | None = None,
        retries: int = 1,
        max_failed: float = 0.5,
        warm: bool = True,
        keep: Keep = "best",
        on_event: Callable[[Event], None] | None = None,
        checkpoint_seconds: float | None = None,
    ) -> Self:
        """Run until the study has a number of trials.

        A trial that an earlier process left unfinished goes on from its checkpoint first.
        Ctrl-C finishes the current step of each trial, stores checkpoints and raises
        KeyboardInterrupt; a second one ends at once.

        Args:
            trials: of the study in total, those of earlier calls included.
            budget: of each trial; a bare integer means training steps.
            rungs: how often a trial reports its value, equally spaced over its budget.
            scheduler: who goes on at a rung.  "auto" is `Halving` where the gradient owns
                something, and `Fifo` elsewhere, with a pruner, and for several objectives.
            total: limit of all trials together, of this study (of this call, for seconds); a trial
                that does not fit any more is finished where it is.
            workers: trials at a time.  Default: 1.
            executor: where trials run: "in_process", "pool" (processes of this host),
                "ray" (actors), or a config such as ``Processes(4, memory=2 << 30)``.  "auto" is a
                pool for several workers or a time limit.
            trial_seconds: wall time after which a trial is ended in the middle of a step, as
                failed.
            retries: how often a trial whose worker died goes on from its checkpoint.
            max_failed: share of failed trials (of at least 10) above which the study stops.
            warm: whether a trial's gradient-owned values start from those of the nearest complete
                trial.
            keep: what comes out of a trial: "best", the weights and values of its best rung by the
                validation split, or "last".  With several objectives always the last.
            on_event: called with each `studies.events.Event`.
            checkpoint_seconds: least wall time between two checkpoints of a trial; by default as
                often as takes at most 2 % of the time.

        Raises:
            LockedError: another process runs this study.
            MismatchError: earlier trials had another budget, other rungs or another scheduler.
            TooManyFailuresError: see `max_failed`.
            ExecutorError: the workers cannot be started.
            TypeError: an algorithm is to tune a learner that has no pure losses.
            ValueError: the learner refuses the task, has no such metric, or an argument is out of
                its range.
            KeyboardInterrupt: the study can be run again to go on.
        """
        check_run(
            trials, rungs, retries, max_failed, trial_seconds, checkpoint_seconds, keep, total
        )
        if workers is not None:
            integer("workers", workers, minimum=1)
        config = executor_config(executor, workers, killing=trial_seconds is not None)
        policy = choose_scheduler(scheduler, self.space, self._study)
        budget = Budget.of(budget)
        told = on_event or (lambda event: None)
        with coordinator_lock(self.files.study, self.name, self.database):
            grid = first_points(policy, self.space, self.seed) if self._sampler_is_default else []
            policy = fitted(policy, self.space, len(grid), self._sampler.enumerates)
            ladder = policy.ladder(trials, rungs)
            ladder = agree_on_run(self._study, self.storage, budget, rungs, policy, ladder, keep)
            setting = self._setting(budget, ladder.rungs, keep, checkpoint_seconds)
            ledger = Ledger(
                self._study, self.database, self.files, self._sampler,
                warm, lambda reason: told(Stalled(reason)),
            )  # fmt: skip
            if not ledger.unfinished(trials):
                return self
            config.prepare()
            rehearse(setting, self._assignment(0, self.space.defaults(), bool(self.space.grad)))
            brackets = Brackets(ledger, policy, ladder, self.space, keep, grid)

            def assign(trial: Trial, values: Mapping[str, Any]) -> Assignment:
                by = ledger.get(trial.number).user_attrs.get("by", "gradient")
                gradient = bool(self.space.grad) and by != "sampler"
                if gradient and warm and by == "gradient":
                    values = warm_values(ledger, self.space, trial, dict(values))
                return self._assignment(trial.number, values, gradient)

            with deferred_interrupt() as interrupt:
                workers_ = config.open(setting, lambda: interrupt.requested)
                try:
                    Coordinator(
                        ledger, setting, brackets, workers_,
                        Limits(trials, total, trial_seconds, retries, max_failed),
                        assign, interrupt, told,
                    ).run()  # fmt: skip
                finally:
                    workers_.close()
        return self

    def _setting(
        self,
        budget: Budget,
        rungs: tuple[float, ...],
        keep: Keep,
        checkpoint_seconds: float | None = None,
    ) -> Setting:
        return Setting(
            learner=self.learner,
            task=self.task,
            space=self.space,
            algorithm=self.algorithm,
            budget=budget,
            rungs=rungs,
            metrics=self.metrics,
            signs=signs(self._study),
            constraints=self.constraints,
            keep=keep,
            checkpoint_seconds=checkpoint_seconds,
        )

    def _assignment(self, number: int, values: Mapping[str, Any], gradient: bool) -> Assignment:
        return Assignment(
            number=number,
            seed=derive_seed(self.seed, "trial", number),
            values=values,
            gradient=gradient,
            checkpoint=self.files.checkpoint(number).absolute(),
        )
