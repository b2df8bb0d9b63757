"""The side that runs trials: the same object in this process, in a pool's and on a Ray node."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch

from studies.messages import Assignment, Decision, Message, Outcome, Setting
from studies.record import Failure, TrialRecord
from studies.trial.run import Steps, run_trial

__all__ = ["Worker"]


class Worker:
    """Runs one trial at a time, from message to message.

    An exception of the learner, or a number that is not finite, makes the trial "failed".
    KeyboardInterrupt passes.

    Args:
        setting: of the study.
        interrupted: asked between two steps whether to pause; by default what `interrupt` set.
    """

    def __init__(self, setting: Setting, interrupted: Callable[[], bool] | None = None) -> None:
        self._setting = setting
        self._asked = False
        self._interrupted = interrupted or self._was_asked
        self._number = -1
        self._steps: Steps | None = None

    def start(self, trial: Assignment) -> Message:
        """Begin a trial, or go on from its checkpoint; returns its first message."""
        self._number = trial.number
        self._steps = run_trial(self._setting, trial, self._interrupted)
        return self._next(None)

    def answer(self, decision: Decision) -> Message:
        """Give the running trial a decision; returns its next message."""
        return self._next(decision)

    def interrupt(self) -> None:
        """Have the running trial pause after its current step."""
        self._asked = True

    def _was_asked(self) -> bool:
        return self._asked

    def _next(self, decision: Decision | None) -> Message:
        if self._steps is None:
            raise RuntimeError("answer: no trial is running; call start first.")
        steps = self._steps
        try:
            return next(steps) if decision is None else steps.send(decision)
        except StopIteration as end:
            self._steps = None
            found: Message = end.value
            return found
        except FloatingPointError as error:
            return self._failed(Failure("not finite", str(error)))
        except (MemoryError, torch.OutOfMemoryError) as error:
            return self._failed(Failure("out of memory", str(error) or "the limit was reached"))
        except Exception as error:
            said = str(error)
            if isinstance(error, RuntimeError) and "can't allocate memory" in said:
                said = said.partition("DefaultCPUAllocator: ")[2] or said
                return self._failed(Failure("out of memory", said.splitlines()[0]))
            return self._failed(Failure("exception", f"{type(error).__name__}: {said}"))

    def _failed(self, failure: Failure) -> Outcome:
        self._steps = None
        record = TrialRecord(self._number, "failed", failure=failure)
        return Outcome(record, {"traceback.txt": traceback.format_exc()})
