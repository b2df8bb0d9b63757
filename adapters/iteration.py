"""Solvers and samplers: iterations without training batches, and the learner that runs them."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from adapters import artifacts
from adapters.learner import Learner
from adapters.method import Setting
from adapters.tasks import Task
from bilevel import checkpoint
from bilevel.checks import integer
from bilevel.describe import describe, differences
from bilevel.metrics import Cost, Metrics, Role, RunStatus
from bilevel.space import Space

__all__ = ["Iterated", "Iteration", "Progress", "solve"]


@dataclass(frozen=True)
class Progress:
    """What one iteration says.

    Attributes:
        entries: named numbers, "loss" among them.
        status: whether the iteration goes on.
        gradients: gradient evaluations spent.
    """

    entries: Mapping[str, float]
    status: RunStatus = RunStatus.RUNNING
    gradients: int = 1


class Iteration(ABC):
    """A solver or a sampler: ``state -> next state``, with its configuration fixed.

    State is plain data (tensors, numbers, strings, lists, dicts), random generators included
    (`torch.Generator.get_state`), so that a stored state goes on as if nothing had happened.

    Attributes:
        name: the registry name.
        space: every hyperparameter.  A `Grad` promises that what the iteration computes (a
            value, samples) is differentiable in it almost everywhere, by the functions of its
            module; an outer loop over trials sees it as a number.
        needs: frozen artifacts, see `adapters.artifacts`.
        task_type: what kind of task it takes.
        roles: roles of metrics that are not plain values.
        setting: what it runs on; there from `start` on.  Its constants hold all hyperparameters.
    """

    name: ClassVar[str]
    space: ClassVar[Space]
    needs: ClassVar[tuple[str, ...]] = ()
    task_type: ClassVar[type[Task]]
    roles: ClassVar[Mapping[str, Role]] = {}

    setting: Setting

    @abstractmethod
    def start(self) -> dict[str, Any]:
        """Return the state before the first iteration; deterministic given the setting's seed.

        Raises:
            ValueError: the task or a hyperparameter does not fit.
        """

    @abstractmethod
    def iterate(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], Progress]:
        """Return the next state and what it says; changes nothing in place."""

    @abstractmethod
    def measure(self, state: Mapping[str, Any], split: str) -> Mapping[str, float]:
        """Return metrics of a state on a split, "loss" among them."""


def configure(
    kind: type[Iteration], space: Space, task: Task, hparams: Mapping[str, Any], seed: int
) -> Iteration:
    """Return a solver or sampler on a task.

    Raises:
        TypeError, ValueError: see `Learner.setup`.
    """
    if not isinstance(task, kind.task_type):
        raise ValueError(
            f"{kind.name} needs a task of type {kind.task_type.__name__}, but {task.name!r} is a "
            f"{type(task).__name__}."
        )
    seed = integer("seed", seed, minimum=0)
    iteration = kind()
    constants = space.validate(hparams, dtype=task.dtype, device=task.device)
    frozen = artifacts.resolve(kind.needs, task, seed)
    iteration.setting = Setting(task, constants, {}, frozen, seed)
    return iteration


@dataclass(frozen=True)
class Solution:
    """Where a solver stopped.

    Attributes:
        state: the last state.
        status: why it stopped; RUNNING where it ran out of iterations.
        steps: iterations done.
        entries: what the last iteration said.
    """

    state: dict[str, Any]
    status: RunStatus
    steps: int
    entries: Mapping[str, float] = field(default_factory=dict)


def solve(
    kind: type[Iteration],
    task: Task,
    hparams: Mapping[str, Any],
    *,
    seed: int = 0,
    max_steps: int = 1000,
) -> Solution:
    """Iterate until the status is final, or `max_steps` times.

    Args:
        kind: a solver or sampler class.
        task: what to solve.
        hparams: a value for some names of its space; others take their default.
        seed: decides every random draw.
        max_steps: most iterations.

    Raises:
        TypeError, ValueError: see `Learner.setup`.
    """
    iteration = configure(kind, kind.space, task, hparams, seed)
    state, said, steps = iteration.start(), Progress({}), 0
    while not said.status.finished and steps < max_steps:
        state, said = iteration.iterate(state)
        steps += 1
    return Solution(state, said.status, steps, said.entries)


class Iterated(Learner):
    """Runs an `Iteration` as a learner: a step is one iteration.

    A "loss" that is not finite ends the run at the state before it, with status DIVERGED.

    Attributes:
        kind: the solver or sampler; subclasses made by `Iterated.of` set it.
    """

    kind: ClassVar[type[Iteration]]

    @staticmethod
    def of(kind: type[Iteration]) -> type[Iterated]:
        """Return the learner class of a solver or sampler.

        Raises:
            TypeError: it has no name, space or docstring.
        """
        for needed in ("name", "space"):
            if not hasattr(kind, needed):
                raise TypeError(f"{kind.__name__} must have a {needed}.")
        if not kind.__doc__:
            raise TypeError(f"{kind.__name__} needs a docstring: its first line is shown.")
        members = {
            "kind": kind,
            "name": kind.name,
            "space": kind.space,
            "needs": kind.needs,
            "__doc__": kind.__doc__,
            "__module__": kind.__module__,
        }
        return type(kind.__name__, (Iterated,), members)

    def setup(self, task: Task, hparams: Mapping[str, Any], *, seed: int) -> None:
        """See `Learner.setup`."""
        self._iteration: Iteration | None = None
        iteration = configure(self.kind, self.space, task, hparams, seed)
        self._state, self._status, self._steps = iteration.start(), RunStatus.RUNNING, 0
        self._iteration = iteration

    @property
    def iteration(self) -> Iteration:
        """The solver or sampler of this run; there after `setup`.

        Raises:
            RuntimeError: before `setup`.
        """
        found: Iteration | None = getattr(self, "_iteration", None)
        if found is None:
            raise RuntimeError(f"{self.name}: call setup(task, hparams, seed=...) first.")
        return found

    @property
    def state(self) -> dict[str, Any]:
        """A copy of the current state."""
        return dict(checkpoint.copy(self._state))

    @property
    def status(self) -> RunStatus:
        """RUNNING, or why no further step is possible."""
        return self._status

    def step(self) -> Metrics:
        """See `Learner.step`."""
        iteration, began = self.iteration, time.perf_counter()
        if self._status.finished:
            return Metrics({"loss": math.nan}, status=self._status)
        state, said = iteration.iterate(self._state)
        self._status = said.status
        if math.isfinite(said.entries["loss"]):
            self._state, self._steps = state, self._steps + 1
        else:
            self._status = RunStatus.DIVERGED
        return Metrics(
            dict(said.entries),
            roles=self.kind.roles,
            status=self._status,
            cost=Cost(steps=1, gradients=said.gradients, seconds=time.perf_counter() - began),
        )

    def evaluate(self, split: str) -> Metrics:
        """See `Learner.evaluate`."""
        began = time.perf_counter()
        self.iteration.setting.task.split(split)
        entries = dict(self.iteration.measure(self._state, split))
        seconds = time.perf_counter() - began
        return Metrics(
            entries, roles=self.kind.roles, status=self._status, cost=Cost(seconds=seconds)
        )

    def state_dict(self) -> dict[str, Any]:
        """See `Learner.state_dict`."""
        state = {
            "run": self._description(),
            "state": self._state,
            "status": self._status.value,
            "step": self._steps,
        }
        return dict(checkpoint.copy(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Learner.load_state_dict`.

        Raises:
            ValueError: the state is of another solver, task, seed or hyperparameters; says which.
        """
        changed = differences(state["run"], self._description(), "run")
        if changed:
            raise ValueError("the saved state is of another run:\n  " + "\n  ".join(changed))
        state = checkpoint.copy(dict(state))
        self._state, self._steps = state["state"], state["step"]
        self._status = RunStatus(state["status"])

    def _description(self) -> dict[str, Any]:

        setting = self.iteration.setting
        return {
            "learner": self.name,
            "task": setting.task.fingerprint,
            "seed": setting.seed,
            "space": self.space.fingerprint,
            "hparams": describe(setting.constants),
        }
