"""The process that worker processes are forked from: torch is imported once for all of them.

It is Python's fork server: started from nothing, it has neither the threads nor the CUDA context
of this process, so that its forks are as safe as spawned processes, and start in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

__all__ = ["context", "start"]


def context() -> ForkServerContext:
    """Return the context of worker processes."""
    return multiprocessing.get_context("forkserver")


def start(*modules: str) -> None:
    """Have the server import what workers need, while this process does something else.

    It ends with this process; a second call does nothing.  Where the program has such a server
    already, that is used.

    Args:
        modules: that workers will need beside those of a worker.
    """
    context().set_forkserver_preload(["studies.executors.preload", *modules])
    if threading.current_thread() is not threading.main_thread():
        forkserver.ensure_running()
        return
    # Inherited: Ctrl-C goes to every process of a terminal, and is the coordinator's to handle.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
