"""What compiling did for a call, or why it did nothing."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CannotCompileError", "CompileReport"]


@dataclass(frozen=True)
class CompileReport:
    """How a call with `compile` other than "off" was computed.

    Attributes:
        mode: what was asked for.
        seconds: time that this call spent tracing and compiling, by the clock; 0.0 where every
            graph was in the cache.
        cached: whether every graph of this call was in the cache.
        eager_steps: inner steps that ran eagerly beside compiled ones: those before the
            optimizer state has its shape, and those that fill no whole chunk.
        reason: why the whole call ran eagerly; None where it did not.
    """

    mode: str
    seconds: float
    cached: bool
    eager_steps: int = 0
    reason: str | None = None

    @property
    def used(self) -> bool:
        """Whether the result came from compiled graphs."""
        return self.reason is None


class CannotCompileError(Exception):
    """A computation that has no compiled form; the message is the reason in a report."""
