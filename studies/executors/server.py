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

__all__ = ["context", "preload_workers", "start"]


def context() -> ForkServerContext:
    """Return the context of worker processes."""
    return multiprocessing.get_context("forkserver")


def preload_workers(*modules: str) -> None:
    """Have worker processes import torch already, while this program still does.

    For the top of a script, before its other imports; else `Study.run` begins with it, and the two
    imports come one after the other::

        from studies import preload_workers

        preload_workers()

        import torch

    Args:
        modules: that workers will need beside those of a worker, such as that of the learner.
    """
    # A worker runs the script's top level, too, before it is one: this is how Python itself tells.
    if not getattr(multiprocessing.current_process(), "_inheriting", False):
        start(*modules)


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
