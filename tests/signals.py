"""Signals for the processes that tests start."""

from __future__ import annotations

import signal

__all__ = ["interruptible"]


def interruptible() -> None:
    """In a child: take SIGINT, which a process started in the background ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
