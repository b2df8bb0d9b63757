"""The executor contract: how a coordinator gives trials to workers and hears of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from studies.messages import Assignment, Decision, Message

__all__ = ["Executor", "ExecutorError"]


class ExecutorError(RuntimeError):
    """The workers cannot be started; the message says why."""


class Executor(ABC):
    """Some workers, each with at most one trial; a trial at a rung waits for its answer."""

    isolated: ClassVar[bool] = True
    """Whether the coordinator outlives a trial that ends its process."""

    @property
    @abstractmethod
    def free(self) -> int:
        """Number of workers that are ready for a trial."""

    @abstractmethod
    def start(self, trial: Assignment) -> None:
        """Give a trial to a free worker."""

    @abstractmethod
    def answer(self, number: int, decision: Decision) -> None:
        """Give a waiting trial its decision."""

    @abstractmethod
    def wait(self, seconds: float | None) -> Message | None:
        """Return the next message of any trial; None where none came in time.

        Raises:
            ExecutorError: workers end before they are ready.
        """

    @abstractmethod
    def interrupt(self) -> None:
        """Have all running trials pause after their current step."""

    def kill(self, number: int) -> None:
        """End a trial at once, in the middle of a step; nothing more is heard of it.

        Raises:
            NotImplementedError: trials of this executor cannot be ended from outside.
        """
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027  (an executor without workers has nothing to end)
        """End the workers; their trials can go on from their checkpoints."""
