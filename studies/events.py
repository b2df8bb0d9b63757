"""What happens in a study while it runs, as values: for progress displays, logs and callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from studies.record import Failure, TrialRecord

__all__ = ["Event", "Finished", "Paused", "Retried", "Rung", "Stalled", "Started"]


@dataclass(frozen=True)
class Started:
    """A trial starts, or goes on where an earlier process left it.

    Attributes:
        number: of the trial.
        of: trials that the study is to have.
        params: what the sampler chose.
        resumed: whether an earlier process had started it.
    """

    number: int
    of: int
    params: Mapping[str, Any]
    resumed: bool


@dataclass(frozen=True)
class Rung:
    """A trial reached a rung and reported its value there.

    Attributes:
        number: of the trial.
        rung: from 1.
        of: rungs of a whole trial.
        value: what the study optimizes.
    """

    number: int
    rung: int
    of: int
    value: float


@dataclass(frozen=True)
class Finished:
    """A trial is over and stored.

    Attributes:
        record: what was stored.
        best: whether it is the best so far.
    """

    record: TrialRecord
    best: bool


@dataclass(frozen=True)
class Paused:
    """A trial stored its state and waits for the others of its bracket.

    Attributes:
        number: of the trial.
        rung: where it waits.
    """

    number: int
    rung: int


@dataclass(frozen=True)
class Retried:
    """The worker of a trial died, and the trial goes on from its checkpoint.

    Attributes:
        number: of the trial.
        failure: how the worker ended.
    """

    number: int
    failure: Failure


@dataclass(frozen=True)
class Stalled:
    """Nothing can be stored at the moment; the study waits and tries again.

    Attributes:
        reason: in words.
    """

    reason: str


Event = Started | Rung | Paused | Retried | Stalled | Finished
