"""Several studies at the same time, each run whole by one of a few spawned processes.

A study needs one coordinator; different studies need nothing of each other.  So independent
studies can run side by side without changing a number.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any, Protocol, TypeVar

__all__ = ["Work", "available_cores", "run_all"]

EventT = TypeVar("EventT")

POLL = 0.1  # seconds between two looks at finished work


class Work(Protocol):
    """Something to do, with values that can be pickled."""

    def __call__(self, on_event: Callable[[Any], None], /) -> None:
        """Do it; tell what happens."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_all(works: Sequence[Work], workers: int, on_event: Callable[[Any], None]) -> None:
    """Do everything, in this process or in several spawned ones.

    The first error or Ctrl-C stops the others as Ctrl-C would: each stores its checkpoint.

    Args:
        works: independent of each other.
        workers: processes; 1 means this one.
        on_event: called in this process with everything that the works tell.
    """
    workers = min(workers, len(works))
    if workers <= 1:
        with _one_thread():
            for work in works:
                work(on_event)
        return
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    with ProcessPoolExecutor(workers, context, _start, (events,)) as pool:
        futures = [pool.submit(_run, work) for work in works]
        try:
            pending: set[Future[None]] = set(futures)
            while pending:
                _drain(events, on_event)
                done, pending = wait(pending, POLL)
                for future in done:
                    future.result()
            _drain(events, on_event)
        except BaseException:
            for future in futures:
                future.cancel()
            for process in multiprocessing.active_children():
                if process.pid is not None:
                    os.kill(process.pid, signal.SIGINT)
            raise


def _drain(events: Any, on_event: Callable[[Any], None]) -> None:
    while True:
        try:
            event = events.get_nowait()
        except queue.Empty:
            return
        on_event(event)


class _one_thread:  # noqa: N801
    """Inside, torch uses one thread: for small networks a second one costs more than it brings."""

    def __enter__(self) -> None:
        import torch

        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        import torch

        torch.set_num_threads(self._before)


# Inside a spawned process.

_events: Any = None
_stopped = False


def _start(events: Any) -> None:
    global _events
    _events = events
    # The terminal's Ctrl-C reaches the parent alone, which passes it on.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, _stop)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _stop(*_: object) -> None:
    global _stopped
    _stopped = True


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(work: Work) -> None:
    if _stopped:  # the pool hands out one more than it runs
        raise KeyboardInterrupt
    try:
        with _one_thread():
            work(_events.put)
    except KeyboardInterrupt:
        _stop()
        raise
