"""Python's garbage collector, out of the way where it finds nothing and takes half of the time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["imports", "paused"]


@contextmanager
def paused() -> Iterator[None]:
    """Collect nothing: among 10⁵ new objects that stay, it would look for cycles over and over."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def imports() -> Iterator[None]:
    """The same for imports, whose objects stay to the end: it is not to look at them any more.

    With torch that is 0.7 s of 2.4 s, most of it when the process ends, and forks share the memory.
    """
    with paused():
        yield
    gc.freeze()
