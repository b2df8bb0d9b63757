"""A study as one value: what `Study` and `Study.run` take, but for the place where it is stored."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Self

from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from adapters import registry
from adapters.learner import Learner
from adapters.tasks import Task
from bilevel.algorithm import OuterAlgorithm
from bilevel.budget import Budget
from bilevel.checks import did_you_mean, integer
from bilevel.space import Space
from studies.arguments import Direction
from studies.events import Event
from studies.study import Study

__all__ = ["Plan", "PlanError", "run_options", "study_options"]

_PLACE = ("self", "storage", "folder")
_OWN = ("self", "trials", "budget", "on_event")


class PlanError(ValueError):
    """A plan that no study can be made of; the message names key, value and expectation."""


def study_options() -> list[str]:
    """Return what `Study` takes, but for the place where it is stored."""
    return [name for name in inspect.signature(Study.__init__).parameters if name not in _PLACE]


def run_options() -> list[str]:
    """Return what `Study.run` takes beside trials and budget."""
    return [name for name in inspect.signature(Study.run).parameters if name not in _OWN]


@dataclass(frozen=True)
class Plan:
    """Everything that decides a study; the place to store it comes with the command.

    Attributes:
        learner: registry name or `Learner` class.
        task: registry name or `Task`.
        trials: of the study in total.
        budget: of each trial; a bare integer means training steps.
        name: of the study.
        space: hyperparameters and owners; None for the learner's.
        algorithm: moves the gradient-owned hyperparameters.
        sampler: name or Optuna sampler.
        pruner: name or Optuna pruner.
        direction: of the objective, or one for each.  Default: "minimize".
        metric: the objective, of the validation split, or several.
        seed: of the study.
        options: further arguments of `Study`.
        run: further arguments of `Study.run`, such as ``{"rungs": 5}``.

    Raises:
        PlanError: a number of trials or a budget out of range; an option that there is not.
    """

    learner: str | type[Learner]
    task: str | Task
    trials: int
    budget: Budget | int
    name: str = "study"
    space: Space | None = None
    algorithm: OuterAlgorithm[Any] | None = None
    sampler: BaseSampler | str | None = None
    pruner: BasePruner | str | None = None
    direction: Direction | Sequence[Direction] | None = None
    metric: str | Sequence[str] = "loss"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            integer("trials", self.trials, minimum=1)
            integer("seed", self.seed, minimum=0)
            Budget.of(self.budget)
        except (TypeError, ValueError) as error:
            raise PlanError(str(error)) from error
        for what, given, known in (
            ("options", self.options, study_options()),
            ("run", self.run, run_options()),
        ):
            for name in given:
                if name not in known:
                    raise PlanError(f"{what}: unknown option {name!r}; {did_you_mean(name, known)}")

    def override(
        self,
        *,
        trials: int | None = None,
        budget: Budget | int | None = None,
        seed: int | None = None,
        own: Mapping[str, str] | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return the plan with other values where they are given.

        Args:
            trials: see the attribute.
            budget: see the attribute.
            seed: see the attribute.
            own: name -> owner, as `Space.own`; ``*`` stands for every gradient-owned name.
                Where the gradient is left with none, the algorithm goes too, so that the same
                plan runs as pure sampling.
            run: added to the options of `Study.run`.

        Raises:
            PlanError: an unknown name, or an owner that a name cannot have.
        """
        plan = replace(
            self,
            trials=self.trials if trials is None else trials,
            budget=self.budget if budget is None else budget,
            seed=self.seed if seed is None else seed,
            run={**self.run, **(run or {})},
        )
        if not own:
            return plan
        space = self.space
        if space is None:
            kind = registry.get(self.learner) if isinstance(self.learner, str) else self.learner
            space = kind.space
        owners = dict(own)
        if "*" in owners:
            everyone = owners.pop("*")
            owners = {**dict.fromkeys(space.grad, everyone), **owners}
        try:
            space = space.own(**owners)
        except ValueError as error:
            raise PlanError(str(error)) from error
        return replace(plan, space=space, algorithm=plan.algorithm if space.grad else None)

    def open(self, storage: str | PathLike[str], folder: str | PathLike[str]) -> Study:
        """Return the study at a place, made there or opened again.

        Raises:
            PlanError: an argument of the wrong type.
            ValueError: see `Study`.
        """
        try:
            return Study(
                self.name,
                self.learner,
                self.task,
                storage,
                space=self.space,
                algorithm=self.algorithm,
                sampler=self.sampler,
                pruner=self.pruner,
                direction=self.direction,
                metric=self.metric,
                seed=self.seed,
                folder=folder,
                **self.options,
            )
        except TypeError as error:
            raise PlanError(str(error)) from error

    def run_in(self, study: Study, on_event: Callable[[Event], None] | None = None) -> Study:
        """Run the study that `open` returned until it has its trials.

        Raises:
            PlanError: an option of the wrong type; a learner that has no pure losses to tune.
            KeyboardInterrupt: and what else `Study.run` raises.
        """
        try:
            return study.run(self.trials, self.budget, on_event=on_event, **self.run)
        except TypeError as error:  # a trial's own errors are stored with it, not raised
            raise PlanError(str(error)) from error
