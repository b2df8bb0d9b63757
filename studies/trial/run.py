"""One trial, from set-up to its end, that stops at every rung and waits for a decision."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Generator
from typing import cast

from adapters.learner import Learner
from bilevel.checkpoint import load, save
from bilevel.inner import Inner
from bilevel.metrics import RunStatus
from studies.messages import Assignment, Decision, Outcome, Paused, Reached, Setting, Stalled
from studies.record import Failure, as_metrics
from studies.sampling.spaces import sampled_space
from studies.trial.kept import Kept
from studies.trial.plain import Plain
from studies.trial.progress import Progress
from studies.trial.tuned import Tuned

__all__ = ["rehearse", "restore", "run_trial", "set_up"]

CHECKPOINT_SHARE = 0.02
"""Share of the time that checkpoints may take where no least time between them is given."""

Steps = Generator[Reached | Stalled, Decision, Outcome | Paused]


def run_trial(setting: Setting, trial: Assignment, interrupted: Callable[[], bool]) -> Steps:
    """Run a trial, from its checkpoint where there is one.

    Yields a message at each rung, takes a decision for it, and returns what came out.  A rung is
    reported again where the checkpoint is from before its decision.

    Args:
        setting: of the study.
        trial: the trial.
        interrupted: asked between two steps; the trial is paused when it says so.

    Raises:
        Exception: whatever the learner raises.
    """
    learner = set_up(setting, trial)
    make = Tuned if trial.gradient else Plain
    progress: Progress = make(setting, trial, learner)
    passed, kept = 0, Kept(setting)
    if trial.checkpoint.exists():
        saved = load(trial.checkpoint)
        progress.load(saved["progress"])
        kept.load(saved["kept"])
        passed = saved["passed"]
    cadence, last = _Cadence(setting.checkpoint_seconds), len(setting.rungs)
    while True:
        due = _due(setting, progress)
        if due > passed and progress.status is not RunStatus.DIVERGED:
            passed = due
            try:
                values = progress.values(due)
            except FloatingPointError as error:
                return progress.outcome(progress.failed(Failure("not finite", str(error))))
            kept.look(progress)
            gain, settled = progress.outlook()
            reached = Reached(trial.number, due, values, gain, settled, progress.cost)
            decision = yield reached
            if decision is Decision.PRUNE and due < last:
                progress.stop(RunStatus.PRUNED, f"pruned at rung {due}")
            elif decision is Decision.FINISH and due < last:
                progress.stop(RunStatus.EARLY_STOPPED, settled or f"finished at rung {due}")
            elif decision is Decision.PAUSE and due < last:
                yield from _store(progress, kept, trial, due - 1)  # nobody has decided
                return Paused(progress.outcome(progress.record(evaluate_test=False)), due)
        if progress.status.finished:
            break
        if interrupted():
            yield from _store(progress, kept, trial, passed)
            return Paused(progress.outcome(progress.record(evaluate_test=False)), passed)
        progress.advance()
        if cadence.due() and not progress.status.finished:
            yield from _store(progress, kept, trial, passed)
            cadence.stored()
    record = progress.record(evaluate_test=False)
    if record.state == "complete":
        kept.look(progress)
    yield from _store(progress, kept, trial, passed)  # the state that `restore` reads
    if record.state == "complete":
        kept.put_back(progress)
        record = progress.record(evaluate_test=True)
    return progress.outcome(record)


def rehearse(setting: Setting, trial: Assignment) -> None:
    """Set the learner up and look at its metrics, so that bad settings show before any trial.

    Raises:
        TypeError: an algorithm is to tune a learner that has no pure losses, or a metric is no
            number.
        ValueError: the learner refuses task or values, or there is no such metric.
    """
    learner = set_up(setting, trial)
    if trial.gradient and not isinstance(learner, Inner):
        raise TypeError(
            f"algorithm: {learner.name} has no pure losses, so the gradient cannot own "
            f"{list(setting.space.grad)}; give them to the sampler with space.own(...)."
        )
    found = as_metrics(learner.evaluate("val"))
    for argument, names in (("metric", setting.metrics), ("constraints", setting.constraints)):
        for name in names:
            if name not in found:
                raise ValueError(f"{argument} must be one of {sorted(found)}, but got {name!r}.")


def restore(setting: Setting, trial: Assignment) -> Learner:
    """Return the learner of a complete trial as it came out of it.

    Raises:
        FileNotFoundError: the checkpoint was not kept.
    """
    learner, saved = set_up(setting, trial), load(trial.checkpoint)
    progress, kept = saved["progress"], Kept(setting)
    kept.load(saved["kept"])
    if trial.gradient:
        state = kept.learner or progress["run"]
        learner.load_state_dict(state["inner"])
        cast(Inner, learner).set_hparams(state["hparams"])
    else:
        learner.load_state_dict(kept.learner or progress["learner"])
    return learner


def set_up(setting: Setting, trial: Assignment) -> Learner:
    """Return the learner before its first step."""
    learner = setting.learner(setting.space if trial.gradient else sampled_space(setting.space))
    learner.setup(setting.task, trial.values, seed=trial.seed)
    return learner


def _due(setting: Setting, progress: Progress) -> int:
    """The number of rungs that were passed."""
    fraction = setting.budget.fraction(progress.cost, progress.outer_steps)
    return sum(rung <= fraction + 1e-9 for rung in setting.rungs)


def _store(
    progress: Progress, kept: Kept, trial: Assignment, passed: int
) -> Generator[Stalled, Decision, None]:
    """Write the checkpoint; where the disk is full, wait until there is room."""
    state = {"progress": progress.stored(), "kept": kept.stored(), "passed": passed}
    while True:
        try:
            save(trial.checkpoint, state)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            yield Stalled(trial.number, f"no checkpoint of trial {trial.number}: {error.strerror}")
        else:
            return


class _Cadence:
    """When the next checkpoint is due."""

    def __init__(self, seconds: float | None) -> None:
        self._least = seconds
        self._at = self._now = time.perf_counter()
        self._takes = 0.0

    def due(self) -> bool:
        self._now = time.perf_counter()
        least = self._takes / CHECKPOINT_SHARE if self._least is None else self._least
        return self._now - self._at >= least

    def stored(self) -> None:
        self._at = time.perf_counter()
        self._takes = self._at - self._now
