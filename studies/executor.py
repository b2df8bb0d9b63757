"""Runs one trial in this process: a learner from set-up to its last step, with rungs on the way."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from adapters.learner import Learner
from adapters.tasks import Task
from bilevel.algorithm import OuterAlgorithm
from bilevel.budget import Budget
from bilevel.callbacks import Callback
from bilevel.checkpoint import load, save
from bilevel.inner import Inner
from bilevel.metrics import Cost, RunStatus
from bilevel.result import Result
from bilevel.run import Run
from bilevel.space import Space
from bilevel.tune import tune
from studies.interrupt import Interrupt, deferred_interrupt
from studies.record import Failure, TrialRecord, as_numbers

__all__ = ["SCHEDULE", "TRACE", "Executor", "Job", "Outcome", "Report", "in_process"]

SCHEDULE = "schedule.json"
"""Artifact with the history of every gradient-owned value."""

TRACE = "trace.json"
"""Artifact with a record for each outer step."""

Report = Callable[[int, float], bool]
"""``(rung, value) -> whether the trial is to be pruned``."""


@dataclass(frozen=True)
class Job:
    """Everything that decides a trial.

    Attributes:
        number: of the trial.
        seed: of the learner.
        learner: its class.
        task: what it learns.
        space: hyperparameters and owners.
        values: of all active hyperparameters at the start.
        algorithm: moves the gradient-owned ones; None where there are none.
        budget: of the trial.
        rungs: how often it reports.
        metric: what it reports, of the validation split.
        checkpoint: where its state is kept while it runs.
        checkpoint_seconds: least wall time between two checkpoints.
    """

    number: int
    seed: int
    learner: type[Learner]
    task: Task
    space: Space
    values: Mapping[str, Any]
    algorithm: OuterAlgorithm[Any] | None
    budget: Budget
    rungs: int
    metric: str
    checkpoint: Path
    checkpoint_seconds: float


@dataclass(frozen=True)
class Outcome:
    """What is stored of a finished trial.

    Attributes:
        record: its numbers.
        files: artifacts: name -> text.
    """

    record: TrialRecord
    files: Mapping[str, str] = field(default_factory=dict)


Executor = Callable[[Job, Report], Outcome]
"""Runs a job to its end; raises KeyboardInterrupt with the job's checkpoint stored."""


def in_process(job: Job, report: Report) -> Outcome:
    """Run a job here, from its checkpoint where there is one.

    An exception of the learner or a loss that is not finite makes the record "failed"; only
    KeyboardInterrupt passes, after the checkpoint was stored.
    """
    try:
        with deferred_interrupt() as interrupt:
            learner = job.learner(job.space)
            learner.setup(job.task, job.values, seed=job.seed)
            run = _train if job.algorithm is None else _tune
            outcome = run(job, learner, report, interrupt)
            interrupt.check()  # pressed in the last step: that step is done again on resume
            return outcome
    except Exception as error:
        failure = Failure("exception", f"{type(error).__name__}: {error}")
        return Outcome(TrialRecord(job.number, "failed", failure=failure))


class _Rungs:
    """Reports a trial's value each time it has passed another share of its budget."""

    def __init__(self, job: Job, report: Report, passed: int = 0) -> None:
        self.job, self.report, self.passed = job, report, passed

    def reached(self, fraction: float, evaluate: Callable[[], Mapping[str, float]]) -> bool:
        """Report the rungs that were passed; says whether the trial is to be pruned."""
        due = math.floor(fraction * self.job.rungs + 1e-9)
        if due <= self.passed:
            return False
        value = _value(evaluate(), self.job.metric)
        if not math.isfinite(value):
            return False
        prune = False
        while self.passed < due and not prune:
            self.passed += 1
            prune = self.report(self.passed, value)
        return prune and self.passed < self.job.rungs


def _value(metrics: Mapping[str, float], metric: str) -> float:
    if metric not in metrics:
        raise ValueError(f"metric must be one of {sorted(metrics)}, but got {metric!r}.")
    return metrics[metric]


# Trials in which the gradient owns nothing.


def _train(job: Job, learner: Learner, report: Report, interrupt: Interrupt) -> Outcome:
    """Train for the budget; every step is one unit of it."""
    cost, rungs, pruned = Cost(), _Rungs(job, report), False
    status = RunStatus.MAX_ITER
    if job.checkpoint.exists():
        saved = load(job.checkpoint)
        learner.load_state_dict(saved["learner"])
        cost, rungs.passed = Cost(**saved["cost"]), saved["rungs"]

    def store() -> None:
        state = {"learner": learner.state_dict(), "cost": asdict(cost), "rungs": rungs.passed}
        save(job.checkpoint, state)

    saved_at = time.monotonic()
    while job.budget.refuses(cost, 0, Cost(steps=1, gradients=1)) is None:
        if interrupt.requested:
            store()
            interrupt.check()
        metrics = learner.step()
        cost += metrics.cost
        if metrics.status.finished:
            status = metrics.status
            break
        before = rungs.passed
        fraction = job.budget.fraction(cost, 0)
        pruned = rungs.reached(fraction, lambda: learner.evaluate("val"))
        if pruned:
            break
        if rungs.passed > before and time.monotonic() - saved_at >= job.checkpoint_seconds:
            store()
            saved_at = time.monotonic()
    if status is RunStatus.DIVERGED:
        failure = Failure("diverged", f"the training loss is not finite at step {cost.steps}")
        return Outcome(TrialRecord(job.number, "failed", cost=cost, failure=failure))
    val = dict(learner.evaluate("val"))
    metrics_ = _prefixed("val", val) | _prefixed("test", dict(learner.evaluate("test")))
    return Outcome(_record(job, val, metrics_, cost, status, pruned, as_numbers(job.values)))


# Trials with gradient-owned hyperparameters.


class _Watch(Callback):
    """Rungs, pruning and Ctrl-C inside `tune`."""

    def __init__(self, job: Job, report: Report, interrupt: Interrupt) -> None:
        self._rungs, self._interrupt = _Rungs(job, report), interrupt

    def on_outer_step(self, run: Run) -> None:
        """See `Callback.on_outer_step`."""

        def evaluate() -> Mapping[str, float]:
            # At the values that the weights were trained with, not at the next ones.
            coming = run.inner.hparams
            run.inner.set_hparams(run.hparams)
            metrics = run.inner.evaluate("val")
            run.inner.set_hparams(coming)
            return metrics

        if self._rungs.reached(run.budget.fraction(run.cost, run.outer_steps), evaluate):
            run.stop(RunStatus.PRUNED, f"pruned at rung {self._rungs.passed}")
        self._interrupt.check()

    def state_dict(self) -> dict[str, Any]:
        """See `Callback.state_dict`."""
        return {"rungs": self._rungs.passed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Callback.load_state_dict`."""
        self._rungs.passed = state["rungs"]


def _tune(job: Job, learner: Learner, report: Report, interrupt: Interrupt) -> Outcome:
    """Tune the gradient-owned values while training."""
    result = tune(
        cast(Inner, learner),
        job.algorithm,
        job.budget,
        callbacks=[_Watch(job, report, interrupt)],
        checkpoint=job.checkpoint,
        checkpoint_every=25,
        resume=job.checkpoint if job.checkpoint.exists() else None,
        seed=job.seed,
    )
    values = as_numbers({**job.values, **result.hparams})
    files = {
        SCHEDULE: result.schedule.to_json(),
        TRACE: json.dumps(result.trace),
    }
    if result.status is RunStatus.DIVERGED:
        failure = Failure("diverged", result.reason)
        record = TrialRecord(job.number, "failed", cost=result.cost, failure=failure)
        return Outcome(record, files)
    val, test = result.val or {}, result.test or {}
    metrics = _prefixed("val", val) | _prefixed("test", test) | _norms(result)
    pruned = result.status is RunStatus.PRUNED
    record = _record(job, val, metrics, result.cost, result.status, pruned, values)
    return Outcome(record, files)


def _norms(result: Result) -> dict[str, float]:
    if not result.trace:
        return {}
    first, last = (float(result.trace[i]["grad_norm"] or 0.0) for i in (0, -1))
    return {"g/norm_first": first, "g/norm_last": last}


def _prefixed(split: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in metrics.items()}


def _record(
    job: Job,
    val: Mapping[str, float],
    metrics: Mapping[str, float],
    cost: Cost,
    status: RunStatus,
    pruned: bool,
    values: Mapping[str, Any],
) -> TrialRecord:
    value = _value(val, job.metric)
    if not math.isfinite(value):
        failure = Failure("not finite", f"val {job.metric} is {value} after {cost.steps} steps")
        return TrialRecord(job.number, "failed", cost=cost, failure=failure)
    return TrialRecord(
        job.number,
        "pruned" if pruned else "complete",
        value=value,
        hparams=dict(values),
        metrics=metrics,
        cost=cost,
        seed=job.seed,
        status=status.value,
    )
