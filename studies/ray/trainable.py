"""A learner as a class trainable of Ray Tune: one trial, reported every few steps.

Tune moves what the sampler owns, by mangled names; the outer algorithm moves what the gradient
owns, inside.  A checkpoint holds weights, gradient-owned values, the state of the outer optimizer,
all random generators and the schedule, as plain data.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from ray import tune

from adapters import registry, tasks
from adapters.learner import Learner
from adapters.tasks import Task
from bilevel.algorithm import OuterAlgorithm
from bilevel.budget import Budget
from bilevel.checkpoint import copy, load, save
from bilevel.checks import integer
from bilevel.metrics import RunStatus
from bilevel.rng import rng_state, seed_generators, set_rng_state
from bilevel.space import Space
from studies.messages import Assignment, Setting
from studies.record import Failure, TrialRecord
from studies.sampling.samplers import derive_seed
from studies.sampling.spaces import check_owners
from studies.trial.plain import Plain
from studies.trial.progress import Progress
from studies.trial.run import rehearse, set_up
from studies.trial.tuned import Tuned

__all__ = ["FAILURE", "FINISHED", "NUMBER", "RECORD", "BilevelTrainable", "as_trainable"]

NUMBER = "trial_number"
"""Entry of a config that `StudySearcher` adds: the number of the trial in its study."""

FINISHED = "finished"
"""Entry of a result: whether the trial is over by itself, not stopped by a scheduler."""

FAILURE = "failure"
"""Entry of a result: {"kind", "message"} where the trial failed."""

RECORD = "record"
"""Entry of a result: the attributes of a `TrialRecord` as JSON, which Tune does not take apart."""

STATE = "state.pt"
"""File of a checkpoint."""


class BilevelTrainable(tune.Trainable):
    """One trial; `as_trainable` makes a subclass for a learner and a task.

    Actors may be reused: a reset frees the old learner, and every draw after it comes from seeds
    of the new trial.
    """

    setting: ClassVar[Setting]
    seed: ClassVar[int]
    steps_per_report: ClassVar[int]
    evaluate_test: ClassVar[bool]

    _progress: Progress | None = None
    _good: dict[str, Any] | None = None

    def setup(self, config: Mapping[str, Any]) -> None:
        """Set the learner up at the values of the config.

        Raises:
            ValueError: a name or a value that the space has not, or that the learner refuses.
        """
        params = dict(config)
        params.pop("study", None)
        number = params.pop(NUMBER, None)
        if number is None:
            number = _index(self.trial_id)
        self._values = self.setting.space.values_from_params(params)
        self._own_seed = derive_seed(self.seed, "trial", number)
        self._begin(self._own_seed)

    def _begin(self, seed: int) -> None:
        seed_generators(seed)  # learners of others may use them
        gradient = bool(self.setting.space.grad)
        trial = Assignment(0, seed, self._values, gradient, Path(STATE))
        make = Tuned if gradient else Plain
        self._progress = make(self.setting, trial, set_up(self.setting, trial))
        self._good = None

    @property
    def progress(self) -> Progress:
        """The trial as it is now."""
        if self._progress is None:
            raise RuntimeError("the trainable was cleaned up; call reset first.")
        return self._progress

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        """Become another trial: nothing of the old one is left."""
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Free the learner."""
        self._progress = self._good = None
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()

    def step(self) -> dict[str, Any]:
        """Do some steps and report the metrics of the validation split.

        A number that is not finite ends the trial with a `FAILURE` and NaN metrics; the
        checkpoint keeps the last good state.
        """
        progress = self.progress
        if isinstance(progress, Plain):  # a tuning run goes back to its last good state itself
            self._good = self._stored()
        try:
            for _ in range(self.steps_per_report):
                if progress.status.finished:
                    break
                progress.advance()
            if not progress.status.finished and self._spent():
                progress.stop(RunStatus.MAX_ITER, "the budget is spent")
            found = progress.record(evaluate_test=False)
        except FloatingPointError as error:
            return self._failed(Failure("not finite", str(error)))
        if found.failure is not None:
            return self._failed(found.failure)
        self._good = None
        over = progress.status.finished
        if over and self.evaluate_test:
            found = progress.record(evaluate_test=True)
        return {
            **{n.removeprefix("val/"): v for n, v in found.metrics.items()},
            **self._counters(),
            "constraint": dict(found.constraints),
            RECORD: json.dumps(found.attributes()),
            FINISHED: over,
            "done": over,
        }

    def _failed(self, failure: Failure) -> dict[str, Any]:
        progress = self.progress
        record = TrialRecord(
            progress.trial.number,
            "failed",
            cost=progress.cost,
            seed=progress.trial.seed,
            failure=failure,
        )
        return {
            **dict.fromkeys(self.setting.metrics, float("nan")),
            **self._counters(),
            FAILURE: asdict(failure),
            RECORD: json.dumps(record.attributes()),
            FINISHED: True,
            "done": True,
        }

    def _counters(self) -> dict[str, Any]:
        cost, outer_steps = self.progress.cost, self.progress.outer_steps
        work = cost.equivalent_steps
        return {"steps": cost.steps, "outer_steps": outer_steps, "equivalent_steps": work}

    def _spent(self) -> bool:
        progress = self.progress
        return self.setting.budget.fraction(progress.cost, progress.outer_steps) >= 1 - 1e-9

    def _stored(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "seed": progress.trial.seed,
            "progress": copy(progress.stored()),
            "rng": rng_state(),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the state, and the schedule and trace where the gradient owns something."""
        folder = Path(checkpoint_dir)
        save(folder / STATE, self._good or self._stored())
        for name, text in self.progress.files().items():
            (folder / name).write_text(text, encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from a checkpoint of this trial, or of another one (an exploit).

        Weights, gradient-owned values, optimizer states, data streams and generators become
        those of the checkpoint; what the sampler owns stays as the config has it.

        Raises:
            ValueError: a checkpoint of another learner, task, space or algorithm.
        """
        saved = load(Path(checkpoint) / STATE)
        if saved["seed"] != self.progress.trial.seed:  # the donor's data streams are taken, too
            self._begin(saved["seed"])
        state, fresh = saved["progress"], self.progress.stored()
        mine, now = _learner_state(state), _learner_state(fresh)
        if "run" in mine:
            # A learner refuses the state of a run with other values; here they may be explored.
            mine["run"]["constants"] = now["run"]["constants"]
        self.progress.load(state)
        set_rng_state(saved["rng"])


def as_trainable(
    learner: str | type[Learner],
    task: str | Task,
    space: Space | None = None,
    algorithm: OuterAlgorithm[Any] | None = None,
    *,
    budget: Budget | int,
    metric: str | tuple[str, ...] = "loss",
    constraints: Mapping[str, float] | None = None,
    steps_per_report: int = 1,
    seed: int = 0,
    evaluate_test: bool = True,
) -> type[BilevelTrainable]:
    """Return a Ray Tune trainable that trains a learner and moves what the gradient owns.

    Its configs are ``space.to_ray()``: sampler-owned values by mangled names.

    Args:
        learner: registry name or `Learner` class.
        task: registry name or `Task`.
        space: the hyperparameters and their owners.  Default: the learner's.
        algorithm: moves the gradient-owned hyperparameters; needed where there are any.
        budget: of a trial; a bare integer means training steps.
        metric: what is optimized, of the validation split; several names for several objectives.
        constraints: metric of the validation split -> its largest feasible value.
        steps_per_report: steps of one Tune iteration: outer steps where the gradient owns
            something, training steps elsewhere.
        seed: of the sweep; a trial's seed derives from it and from the trial's number (with
            `StudySearcher`), or else the index at the end of its id.
        evaluate_test: whether the last report has the metrics of the test split.

    Raises:
        TypeError: an algorithm is to tune a learner that has no pure losses.
        ValueError: an unknown name, a missing or needless algorithm, no such metric.
    """
    kind = registry.get(learner) if isinstance(learner, str) else learner
    subject = tasks.get(task) if isinstance(task, str) else task
    owners = kind.space if space is None else space
    integer("steps_per_report", steps_per_report, minimum=1)
    check_owners(owners, algorithm)
    metrics = (metric,) if isinstance(metric, str) else tuple(metric)
    setting = Setting(
        learner=kind,
        task=subject,
        space=owners,
        algorithm=algorithm,
        budget=Budget.of(budget),
        rungs=(1.0,),
        metrics=metrics,
        signs=(1,) * len(metrics),  # Tune has the directions
        constraints=dict(constraints or {}),
        keep="last",
    )
    rehearse(setting, Assignment(0, 0, owners.defaults(), bool(owners.grad), Path(STATE)))
    own = {
        "setting": setting,
        "seed": integer("seed", seed, minimum=0),
        "steps_per_report": steps_per_report,
        "evaluate_test": evaluate_test,
    }
    return type(f"{kind.name}_{subject.name}", (BilevelTrainable,), own)


def _learner_state(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The learner's part of what `Progress.stored` returned."""
    found: dict[str, Any] = stored["learner"] if "learner" in stored else stored["run"]["inner"]
    return found


def _index(trial_id: str) -> int | str:
    """Tune's ids end in the index of the trial where it draws the configs itself."""
    found = re.search(r"_(\d+)$", trial_id)
    return int(found[1]) if found else trial_id
