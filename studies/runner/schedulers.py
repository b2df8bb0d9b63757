"""Who goes on at a rung: everyone, whom a pruner lets, or the best share of a bracket.

A scheduler is a pure function of what the database holds, so that a study that was killed decides
as it would have.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from studies.record import Kind, State

__all__ = ["Fifo", "Halving", "Ladder", "Member", "Scheduler", "Verdict"]


class Verdict(Enum):
    """What becomes of a trial at a rung."""

    GO = "go"
    WAIT = "wait"
    PRUNE = "prune"


@dataclass(frozen=True)
class Member:
    """A trial as a scheduler sees it; smaller values are better.

    Attributes:
        number: of the trial.
        state: of the trial.
        by: who moves the gradient-owned values.
        value: at the end; None until then.
        rungs: value at each rung so far.
        gains: predicted gain of the next outer step, at each rung so far where there is one.
        settled: whether the gradient had nothing more to give, at the last rung.
    """

    number: int
    state: State
    by: Kind
    value: float | None
    rungs: Mapping[int, float]
    gains: Mapping[int, float] = field(default_factory=dict)
    settled: bool = False


@dataclass(frozen=True)
class Ladder:
    """The rungs of a study's trials.

    Attributes:
        rungs: shares of a trial's budget at which it reports, increasing up to 1.
        levels: those of the rungs, from 1, at which a bracket is halved.
        width: trials of a bracket.
    """

    rungs: tuple[float, ...]
    levels: tuple[int, ...]
    width: int


class Scheduler(ABC):
    """Decides who goes on; a frozen dataclass."""

    stops_settled: ClassVar[bool] = False
    """Whether a trial ends early, as complete, where its gradient has nothing more to give."""

    @abstractmethod
    def ladder(self, trials: int, rungs: int) -> Ladder:
        """Return the rungs of a study of so many trials, which report at least `rungs` times."""

    @abstractmethod
    def verdict(
        self, number: int, bracket: Sequence[Member], whole: bool, levels: Sequence[int]
    ) -> Verdict:
        """Return what becomes of a trial at its last rung.

        Args:
            number: of the trial.
            bracket: all its trials so far.
            whole: whether no further trial will join it.
            levels: rungs at which the bracket is halved.
        """

    def kinds(self, width: int, earlier: Sequence[Sequence[Member]], given: int = 0) -> list[Kind]:
        """Return who chooses the gradient-owned values in each trial of the next bracket.

        Args:
            width: trials of the bracket.
            earlier: the brackets before it.
            given: so many of its first trials are at points that are not left to the sampler.
        """
        return ["gradient"] * width


@dataclass(frozen=True)
class Fifo(Scheduler):
    """Every trial goes on to its end, unless the study's pruner objects at a rung."""

    def ladder(self, trials: int, rungs: int) -> Ladder:
        """See `Scheduler.ladder`."""
        return Ladder(_equal(rungs), (), 1)

    def verdict(
        self, number: int, bracket: Sequence[Member], whole: bool, levels: Sequence[int]
    ) -> Verdict:
        """See `Scheduler.verdict`."""
        return Verdict.GO


@dataclass(frozen=True)
class Halving(Scheduler):
    """Synchronous successive halving with pause and resume.

    A bracket's n trials run to the first level and are paused there; the best n/η of them, by
    value and then by predicted gain, go on to the next, and so forth; the others are pruned.
    Levels are the shares η^(1−L), ..., η^(−1), 1 of the budget, L = 1 + ⌊log_η n⌋, and nobody is
    trained twice, so that a bracket of n = η^(L−1) trials costs 1 + (L−1)(1 − 1/η) budgets.

    In a bracket of four or more, a third of the trials start their gradient-owned values where the
    sampler says, since a hypergradient leads to the next minimum only; those whose points are
    given do not.  The last trial is one at sampled values, without hypergradients.  Where that
    kind is best so far it gets all but one of the trials of the next bracket, and all of them
    where every gradient had settled.  So a study whose hypergradients do not help goes on as a
    search.

    Attributes:
        eta: η, an integer above 1.
        most: n; by default up to η².
        mix: whether some trials are at, or start from, sampled values.

    Raises:
        ValueError: a number out of its range.

    Source: Jamieson and Talwalkar, AISTATS 2016, arXiv 1502.07943, algorithm 1; the kinds are ours.
    """

    stops_settled: ClassVar[bool] = True
    eta: int = 3
    most: int | None = None
    mix: bool = True

    def __post_init__(self) -> None:
        if self.eta < 2:
            raise ValueError(f"eta must be at least 2, but got {self.eta}.")
        if self.most is not None and self.most < 1:
            raise ValueError(f"most must be at least 1, but got {self.most}.")

    def ladder(self, trials: int, rungs: int) -> Ladder:
        """See `Scheduler.ladder`."""
        width = min(trials, self.most or self.eta**2)
        shares, level = set(_equal(rungs)), 1
        halved = []
        while self.eta**level <= width:
            halved.append(float(self.eta) ** -level)
            level += 1
        every = sorted(shares | set(halved))
        return Ladder(tuple(every), tuple(sorted(every.index(h) + 1 for h in halved)), width)

    def verdict(
        self, number: int, bracket: Sequence[Member], whole: bool, levels: Sequence[int]
    ) -> Verdict:
        """See `Scheduler.verdict`."""
        me = next(member for member in bracket if member.number == number)
        survivors = list(bracket)
        for halvings, level in enumerate(levels, 1):
            if level > max(me.rungs, default=0):
                return Verdict.GO
            going = [m for m in survivors if m.state in ("running", "waiting")]
            if not whole or any(level > max(m.rungs, default=0) for m in going):
                return Verdict.WAIT
            kept = max(1, math.ceil(len(bracket) / self.eta**halvings))
            scores = {m.number: _score(m, level) for m in survivors}
            ranked = sorted(
                (m for m in survivors if scores[m.number] is not None),
                key=lambda m: (scores[m.number], -_gain(m, level), m.number),
            )
            survivors = ranked[:kept]
            if me not in survivors:
                return Verdict.PRUNE
        return Verdict.GO

    def kinds(self, width: int, earlier: Sequence[Sequence[Member]], given: int = 0) -> list[Kind]:
        """See `Scheduler.kinds`."""
        mixed: list[Kind] = ["gradient"] * width
        if not self.mix:
            return mixed
        if width >= 4:
            first = max(1, given, width - 1 - width // 3)
            mixed[first:] = ["both"] * (width - first)
            mixed[-1] = "sampler"
        members = [member for bracket in earlier for member in bracket]
        gradients = [m for m in members if m.by != "sampler" and m.state != "failed"]
        if earlier and all(m.settled for m in gradients):
            return ["sampler"] * width
        ended = ((m.value, m.by == "sampler") for m in members if m.value is not None)
        _, sampler_leads = min(ended, default=(math.inf, False))
        if sampler_leads:
            return ["gradient" if i == 0 < width - 1 else "sampler" for i in range(width)]
        return mixed


def _score(member: Member, rung: int) -> float | None:
    """Value at a rung, or at an earlier end; None if failed."""
    if member.state == "failed":
        return None
    at = _reached(member, rung)
    return member.value if at is None else member.rungs[at]


def _gain(member: Member, rung: int) -> float:
    at = _reached(member, rung)
    return 0.0 if at is None else member.gains.get(at, 0.0)


def _reached(member: Member, rung: int) -> int | None:
    """The rung, or the one that a long step led to beyond it."""
    return min((reached for reached in member.rungs if reached >= rung), default=None)


def _equal(rungs: int) -> tuple[float, ...]:
    return tuple((i + 1) / rungs for i in range(rungs))
