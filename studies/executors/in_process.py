"""Trials in the coordinator's own process, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from studies.executors.base import Executor
from studies.messages import Assignment, Decision, Message, Outcome, Paused, Setting
from studies.trial.worker import Worker

__all__ = ["InProcess"]


class InProcess(Executor):
    """One worker, which works while the coordinator waits.

    Args:
        setting: of the study.
        interrupted: asked between two steps whether to pause.
    """

    isolated: ClassVar[bool] = False

    def __init__(self, setting: Setting, interrupted: Callable[[], bool]) -> None:
        self._worker = Worker(setting, interrupted)
        self._running: int | None = None
        self._due: Callable[[], Message] | None = None

    @property
    def free(self) -> int:
        """See `Executor.free`."""
        return int(self._running is None)

    def start(self, trial: Assignment) -> None:
        """See `Executor.start`."""
        self._running = trial.number
        self._due = lambda: self._worker.start(trial)

    def answer(self, number: int, decision: Decision) -> None:
        """See `Executor.answer`."""
        self._due = lambda: self._worker.answer(decision)

    def wait(self, seconds: float | None) -> Message | None:
        """See `Executor.wait`; takes as long as the trial does to its next rung."""
        if self._due is None:
            time.sleep(0.05 if seconds is None else min(seconds, 0.05))
            return None
        message = self._due()
        self._due = None
        if isinstance(message, Outcome | Paused):
            self._running = None
        return message

    def interrupt(self) -> None:
        """See `Executor.interrupt`; the worker asks for itself."""
