"""The one process that asks, starts, tells and stores the trials of a study."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from optuna.trial import Trial, TrialState

from bilevel.budget import Budget
from bilevel.metrics import Cost
from studies import messages
from studies.events import Event, Finished, Paused, Retried, Rung, Stalled, Started
from studies.executors.base import Executor
from studies.messages import Assignment, Decision, Lost, Message, Outcome, Reached, Setting
from studies.record import Failure, TrialRecord
from studies.runner.bracket import Brackets
from studies.runner.interrupt import Interrupt
from studies.runner.ledger import Ledger
from studies.runner.schedulers import Verdict

__all__ = ["Coordinator", "Limits", "TooManyFailuresError"]

MAX_FAILED_AFTER = 10
"""Trials before which no share of failures ends a study."""

STALL_SECONDS = 1.0
"""Wall time between two tries to store a checkpoint on a full disk."""


class TooManyFailuresError(RuntimeError):
    """More trials failed than allowed; the message counts the reasons."""


@dataclass(frozen=True)
class Limits:
    """When a study ends, and when a trial is given up.

    Attributes:
        trials: of the study in total.
        total: cost of all trials together; None for none.
        trial_seconds: wall time that a trial may run; None for none.
        retries: how often a trial whose worker died goes on from its checkpoint.
        max_failed: share of failed trials (of at least 10) above which the study stops.
    """

    trials: int
    total: Budget | None = None
    trial_seconds: float | None = None
    retries: int = 1
    max_failed: float = 0.5


@dataclass
class _Live:
    """A trial at a worker; `began` is earlier by the seconds of its earlier stays.

    `ahead` is what it may spend until it reports again, as far as that can be told.
    """

    trial: Trial
    began: float
    cost: Cost = field(default_factory=Cost)
    ahead: Cost = field(default_factory=Cost)
    answer_at: float | None = None
    stalled: bool = False


class Coordinator:
    """Runs trials until there are enough.

    Whatever ends the process, the database says where the study stands: a trial that is RUNNING
    while nobody holds the lock is paused, or was left by a dead process and goes on from its
    checkpoint.

    Args:
        ledger: what is stored.
        setting: of the trials.
        brackets: who goes on.
        executor: the workers.
        limits: when to stop.
        assign: trial -> assignment, the gradient-owned values it starts from included.
        interrupt: whether Ctrl-C was pressed.
        on_event: called with everything that happens.
    """

    def __init__(
        self,
        ledger: Ledger,
        setting: Setting,
        brackets: Brackets,
        executor: Executor,
        limits: Limits,
        assign: Callable[[Trial, Mapping[str, object]], Assignment],
        interrupt: Interrupt,
        on_event: Callable[[Event], None],
    ) -> None:
        self._ledger, self._setting, self._brackets = ledger, setting, brackets
        self._executor, self._limits, self._assign = executor, limits, assign
        self._interrupt, self._on_event = interrupt, on_event
        self._live: dict[int, _Live] = {}
        self._waiting: set[int] = set()
        self._used: dict[int, float] = {}  # seconds at workers, of trials that left them
        self._began = time.monotonic()
        self._stopping = False

    def run(self) -> None:
        """Go on until the study has its trials, its total is spent, or nothing is left to sample.

        Raises:
            TooManyFailuresError: see `Limits.max_failed`.
            KeyboardInterrupt: all running trials have stored their checkpoints.
        """
        self._waiting = {t.number for t in self._ledger.trials() if t.state is TrialState.RUNNING}
        self._check_failures()
        while True:
            if self._interrupt.requested and not self._stopping:
                self._stopping = True
                self._executor.interrupt()
            began = time.monotonic()
            more = not self._stopping and self._give_out()
            self._excuse(time.monotonic() - began)
            if not self._live and not more:
                if self._stopping:
                    raise KeyboardInterrupt
                return
            message = self._executor.wait(self._patience())
            if message is not None:
                began = time.monotonic()
                self._hear(message)
                self._excuse(time.monotonic() - began)
            self._look_at_the_clock()

    # Giving out.

    def _give_out(self) -> bool:
        """Prune who lost, and start who may; says whether anybody is left to start."""
        while True:
            ready = self._ready()
            if not ready and not self._may_ask():
                if self._live or not self._waiting:
                    return False
                self._brackets.close()  # nobody will join any more: decide with who is there
                if not (ready := self._ready()):
                    if self._waiting:
                        raise RuntimeError(f"trials {sorted(self._waiting)} wait for nobody.")
                    return False
            if not self._executor.free:
                return True
            if ready:
                self._start(ready[0], resumed=True)
            elif self._may_ask():
                self._start(self._ledger.ask(self._brackets.given()).number, resumed=False)

    def _ready(self) -> list[int]:
        """Return the waiting trials that go on, those of the highest rung first."""
        ready = []
        for trial in self._ledger.trials():
            if trial.number not in self._waiting:
                continue
            verdict = self._brackets.verdict(trial)
            if verdict is Verdict.PRUNE and self._ledger.is_described(trial):
                self._waiting.discard(trial.number)
                # All else is stored already.
                pruned = Outcome(TrialRecord(trial.number, "pruned", status="pruned"))
                self._tell(self._ledger.trial(trial), pruned)
            elif verdict is not Verdict.WAIT:  # one that was killed before it said how it stands
                ready.append((-max(trial.intermediate_values, default=0), trial.number))
        return [number for _, number in sorted(ready)]

    def _may_ask(self) -> bool:
        asked = sum(t.state is not TrialState.WAITING for t in self._ledger.trials())
        if asked >= self._limits.trials or self._ledger.exhausted:
            return False
        return self._affords(Cost(steps=1, gradients=1))

    def _affords(self, ahead: Cost) -> bool:
        """Whether the total of the study allows further work."""
        if self._limits.total is None:
            return True
        spent = self._ledger.spent(self._live)
        for live in self._live.values():
            spent += live.cost + live.ahead
        spent = Cost(spent.steps, spent.gradients, spent.hvps, time.monotonic() - self._began)
        return self._limits.total.refuses(spent, 0, ahead) is None

    def _start(self, number: int, *, resumed: bool) -> None:
        frozen = self._ledger.get(number)
        trial = self._ledger.trial(frozen)
        values = self._brackets.enter(trial, self._limits.trials)
        assignment = self._assign(trial, values)
        cost = TrialRecord.of(frozen).cost  # of earlier stays, as far as it is stored
        self._waiting.discard(number)
        self._on_event(Started(number, self._limits.trials, trial.params, resumed))
        if not self._executor.isolated:
            deaths = self._ledger.count_start(trial, assignment.checkpoint)
            if deaths is not None:
                self._tell(trial, _failed(number, Failure("died", deaths), cost))
                return
        ahead = Cost() if resumed else self._first()
        began = time.monotonic() - self._used.get(number, 0.0)
        self._live[number] = _Live(trial, began, cost, ahead)
        self._executor.start(assignment)

    # Hearing.

    def _hear(self, message: Message) -> None:
        live = self._live[message.number]
        if isinstance(message, Reached):
            live.cost, live.ahead, live.stalled = message.cost, Cost(), False
            if self._ledger.report(live.trial, message):
                of = len(self._setting.rungs)
                self._on_event(Rung(message.number, message.rung, of, message.values[0]))
            self._executor.answer(message.number, self._decide(live.trial, message))
        elif isinstance(message, messages.Stalled):
            if not live.stalled:
                self._on_event(Stalled(message.reason))
            live.stalled = True
            live.answer_at = time.monotonic() + STALL_SECONDS
        else:
            self._used[message.number] = time.monotonic() - live.began
            del self._live[message.number]
            if isinstance(message, Outcome):
                failure, cost = message.record.failure, message.record.cost
                if failure is not None and not cost.equivalent_steps:  # it cannot say any more
                    message = replace(message, record=replace(message.record, cost=live.cost))
                self._tell(live.trial, message)
            elif isinstance(message, Lost):
                self._lose(live, message.failure)
            else:
                self._ledger.pause(live.trial, message.so_far, message.rung)
                self._waiting.add(message.number)
                rungs = self._ledger.get(message.number).intermediate_values
                self._on_event(Paused(message.number, max(rungs, default=0)))

    def _decide(self, trial: Trial, reached: Reached) -> Decision:
        if self._stopping:
            return Decision.PAUSE
        last = reached.rung == len(self._setting.rungs)
        known = self._ledger.get(trial.number).intermediate_values
        if reached.rung < max(known, default=0):  # it was decided before a worker or we died
            return Decision.GO
        if reached.settled and not last and self._brackets.stops_settled:
            return Decision.FINISH
        verdict = self._brackets.verdict(self._ledger.get(trial.number))
        if verdict is Verdict.PRUNE or self._ledger.pruner_objects(trial):
            return Decision.PRUNE
        if verdict is Verdict.WAIT:
            return Decision.PAUSE
        if not last:
            ahead = self._ahead(reached)
            if not self._affords(ahead):
                return Decision.FINISH
            self._live[trial.number].ahead = ahead
        return Decision.GO

    def _first(self) -> Cost:
        """What a new trial will cost up to its first rung."""
        share, budget = self._setting.rungs[0], self._setting.budget
        steps, work = round(share * (budget.steps or 0)), budget.equivalent_steps or 0
        return Cost(steps, max(steps, round(share * work)))

    def _ahead(self, reached: Reached) -> Cost:
        """What a trial will cost up to its next rung, if it goes on as before."""
        before, after = self._setting.rungs[reached.rung - 1 : reached.rung + 1]
        ratio, cost = (after - before) / before, reached.cost
        return Cost(round(ratio * cost.steps), round(ratio * cost.equivalent_steps))

    def _lose(self, live: _Live, failure: Failure) -> None:
        """The worker died: the same trial goes on, or is given up."""
        trial = live.trial
        if self._ledger.count_loss(trial) > self._limits.retries:
            self._tell(trial, _failed(trial.number, failure, live.cost))
            return
        self._on_event(Retried(trial.number, failure))
        self._waiting.add(trial.number)

    def _tell(self, trial: Trial, outcome: Outcome) -> None:
        unfinished = {*self._live, *self._waiting}
        record, best = self._ledger.finish(trial, outcome, unfinished)
        self._on_event(Finished(record, best))
        self._check_failures()

    # The clock.

    def _excuse(self, seconds: float) -> None:
        """What this process did meanwhile, waiting for a full disk included, is not their time."""
        for live in self._live.values():
            live.began += seconds

    def _patience(self) -> float:
        """Seconds until something must be done even if nobody says anything."""
        now, due = time.monotonic(), []
        for live in self._live.values():
            if live.answer_at is not None:
                due.append(live.answer_at - now)
            if self._limits.trial_seconds is not None:
                due.append(live.began + self._limits.trial_seconds - now)
        return max(0.0, min([*due, 0.25]))  # Ctrl-C is looked at four times a second

    def _look_at_the_clock(self) -> None:
        now, limit = time.monotonic(), self._limits.trial_seconds
        for number, live in list(self._live.items()):
            if live.answer_at is not None and now >= live.answer_at:
                live.answer_at = None
                self._executor.answer(number, Decision.GO)
            elif limit is not None and now - live.began > limit:
                self._executor.kill(number)
                del self._live[number]
                failure = Failure("timeout", f"over its limit of {limit:g} s")
                self._tell(live.trial, _failed(number, failure, live.cost))

    def _check_failures(self) -> None:
        finished = [t for t in self._ledger.trials() if t.state.is_finished()]
        failed = [t for t in finished if t.state is TrialState.FAIL]
        most = self._limits.max_failed
        if len(finished) >= MAX_FAILED_AFTER and len(failed) > most * len(finished):
            reasons = Counter(str(TrialRecord.of(trial).failure) for trial in failed)
            shown = "; ".join(f"{n} × {reason}" for reason, n in reasons.most_common(3))
            raise TooManyFailuresError(
                f"{len(failed)} of {len(finished)} trials failed, more than {most:.0%}: {shown}."
            )


def _failed(number: int, failure: Failure, cost: Cost) -> Outcome:
    return Outcome(TrialRecord(number, "failed", failure=failure, cost=cost))
