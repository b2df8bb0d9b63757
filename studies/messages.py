"""What a coordinator and its workers say to each other: assignments, decisions, messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from adapters.learner import Learner
from adapters.tasks import Task
from bilevel.algorithm import OuterAlgorithm
from bilevel.budget import Budget
from bilevel.metrics import Cost
from bilevel.space import Space
from studies.record import Failure, TrialRecord

__all__ = [
    "SCHEDULE",
    "TRACE",
    "Assignment",
    "Decision",
    "Keep",
    "Lost",
    "Message",
    "Outcome",
    "Paused",
    "Reached",
    "Setting",
    "Stalled",
]

Keep = Literal["best", "last"]

SCHEDULE = "schedule.json"
"""Artifact with the history of every gradient-owned value."""

TRACE = "trace.json"
"""Artifact with a record for each outer step."""


@dataclass(frozen=True)
class Setting:
    """What all trials of a study have in common.

    Attributes:
        learner: its class.
        task: what it learns.
        space: hyperparameters and owners.
        algorithm: moves the gradient-owned ones; None where there are none.
        budget: of a trial.
        rungs: shares of the budget, increasing up to 1, at which a trial reports.
        metrics: what the study optimizes, of the validation split.
        signs: 1 for each metric that is minimized and -1 for each that is maximized.
        constraints: metric of the validation split -> largest feasible value.
        keep: the weights that come out of a trial: of its best rung, or its last.
        checkpoint_seconds: least wall time between two checkpoints of a trial; None: as often as
            it takes at most 2 % of the time.
    """

    learner: type[Learner]
    task: Task
    space: Space
    algorithm: OuterAlgorithm[Any] | None
    budget: Budget
    rungs: tuple[float, ...]
    metrics: tuple[str, ...]
    signs: tuple[int, ...]
    constraints: Mapping[str, float] = field(default_factory=dict)
    keep: Keep = "best"
    checkpoint_seconds: float | None = None


@dataclass(frozen=True)
class Assignment:
    """What one trial is.

    Attributes:
        number: of the trial.
        seed: of the learner.
        values: of all active hyperparameters at the start.
        gradient: whether the gradient moves what it owns; otherwise it stays at `values`.
        checkpoint: where its state is kept while it is unfinished.
    """

    number: int
    seed: int
    values: Mapping[str, Any]
    gradient: bool
    checkpoint: Path


class Decision(Enum):
    """What a trial at a rung is to do."""

    GO = "go"
    PAUSE = "pause"
    PRUNE = "prune"
    FINISH = "finish"


@dataclass(frozen=True)
class Reached:
    """A trial reached a rung and waits for a decision.

    Attributes:
        number: of the trial.
        rung: from 1; the last one that was passed.
        values: of the study's metrics.
        gain: predicted decrease of the outer loss by the next outer step, to first order; 0 for a
            trial without gradients.
        settled: why the gradient has nothing more to give, in words; empty where it has.
        cost: work so far.
    """

    number: int
    rung: int
    values: tuple[float, ...]
    gain: float
    settled: str
    cost: Cost


@dataclass(frozen=True)
class Outcome:
    """A trial is over.

    Attributes:
        record: its numbers.
        files: artifacts: name -> text.
        hparams: gradient-owned values at its end, for trials that start from them.
    """

    record: TrialRecord
    files: Mapping[str, str] = field(default_factory=dict)
    hparams: Mapping[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """Of the trial."""
        return self.record.number


@dataclass(frozen=True)
class Paused:
    """A trial has stored its checkpoint and left its worker.

    Attributes:
        so_far: what is stored of it if it never goes on.
        rung: the last one that it reported; 0 for none.
    """

    so_far: Outcome
    rung: int

    @property
    def number(self) -> int:
        """Of the trial."""
        return self.so_far.number


@dataclass(frozen=True)
class Stalled:
    """A trial cannot store its checkpoint; it tries again when it is answered.

    Attributes:
        number: of the trial.
        reason: in words.
    """

    number: int
    reason: str


@dataclass(frozen=True)
class Lost:
    """The worker of a trial is gone, and a new one has its place.

    Attributes:
        number: of the trial.
        failure: how it ended.
    """

    number: int
    failure: Failure


Message = Reached | Outcome | Paused | Stalled | Lost
