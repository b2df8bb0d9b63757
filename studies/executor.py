"""Runs one trial in this process: a learner from set-up to its last step, with rungs on the way."""

from __future__ import annotations

import csv
import io
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
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

__all__ = [
    "SCHEDULE",
    "TRACE",
    "Executor",
    "Job",
    "Outcome",
    "Report",
    "in_process",
    "rehearse",
    "restore",
]

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

    An exception of the learner, or a number that is not finite, makes the record "failed".
    KeyboardInterrupt passes, after the checkpoint was stored, and so do errors of `report`.
    """
    try:
        with deferred_interrupt() as interrupt:
            learner = _set_up(job)
            if job.algorithm is None:
                outcome = _train(job, learner, _passing(report), interrupt)
            else:
                outcome = _tune(job, job.algorithm, learner, _passing(report), interrupt)
            interrupt.check()  # pressed in the last step: the coordinator shall not go on
            return outcome
    except _ReportFailed as error:
        raise error.error from None
    except FloatingPointError as error:
        failure = Failure("not finite", str(error))
    except Exception as error:
        failure = Failure("exception", f"{type(error).__name__}: {error}")
    files = {"traceback.txt": traceback.format_exc()}
    return Outcome(TrialRecord(job.number, "failed", failure=failure), files)


def rehearse(job: Job) -> None:
    """Set the learner up and look at its metrics, so that bad settings show before any trial.

    Raises:
        TypeError: an algorithm is to tune a learner that has no pure losses.
        ValueError: the learner refuses task or values, or there is no such metric.
    """
    learner = _set_up(job)
    if job.algorithm is not None and not isinstance(learner, Inner):
        raise TypeError(
            f"algorithm: {learner.name} has no pure losses, so the gradient cannot own "
            f"{list(job.space.grad)}; give them to the sampler with space.own(...)."
        )
    _value(learner.evaluate("val"), job.metric)


def restore(job: Job) -> Learner:
    """Return the learner of a job as its checkpoint has it.

    Raises:
        FileNotFoundError: the checkpoint was not kept.
    """
    learner, saved = _set_up(job), load(job.checkpoint)
    if job.algorithm is None:
        learner.load_state_dict(saved["learner"])
    else:
        learner.load_state_dict(saved["run"]["inner"])
        cast(Inner, learner).set_hparams(saved["run"]["hparams"])
    return learner


def _set_up(job: Job) -> Learner:
    learner = job.learner(job.space)
    learner.setup(job.task, job.values, seed=job.seed)
    return learner


class _ReportFailed(BaseException):
    """An error of the coordinator on its way through a trial, which is not to blame for it."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _passing(report: Report) -> Report:
    def passing(rung: int, value: float) -> bool:
        try:
            return report(rung, value)
        except Exception as error:
            raise _ReportFailed(error) from error

    return passing


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
            where = f"at {due / self.job.rungs:.0%} of the budget"
            raise FloatingPointError(f"val {self.job.metric} is {value} {where}")
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

    saved_at = now = time.perf_counter()
    while job.budget.refuses(cost, 0, Cost(steps=1, gradients=1)) is None:
        if interrupt.requested:
            store()
            interrupt.check()
        metrics = learner.step()
        cost += replace(metrics.cost, seconds=time.perf_counter() - now)
        now = time.perf_counter()
        if metrics.status.finished:
            status = metrics.status
            break
        before = rungs.passed
        fraction = job.budget.fraction(cost, 0)
        pruned = rungs.reached(fraction, lambda: learner.evaluate("val"))
        if pruned:
            break
        if rungs.passed > before and now - saved_at >= job.checkpoint_seconds:
            store()
            saved_at = now
    store()
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


def _tune(
    job: Job,
    algorithm: OuterAlgorithm[Any],
    learner: Learner,
    report: Report,
    interrupt: Interrupt,
) -> Outcome:
    """Tune the gradient-owned values while training."""
    result = tune(
        cast(Inner, learner),
        algorithm,
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
        "schedule.csv": _csv(result.schedule.columns()),
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


def _csv(columns: Mapping[str, list[float]]) -> str:
    """The schedule as the table that optuna-dashboard previews."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


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
