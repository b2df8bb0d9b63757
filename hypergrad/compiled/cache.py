"""Compiled programs by what they were compiled for: bounded, and gone with their losses."""

from __future__ import annotations

import time
import types
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from hypergrad.compiled.guards import Guards
from hypergrad.compiled.report import CannotCompileError
from hypergrad.problem import Problem

__all__ = ["PROGRAMS", "Cache", "Entry"]


@dataclass
class Entry:
    """A compiled program for one problem, or the reason why there is none.

    Attributes:
        program: the program; None where there is none.
        reason: why there is none.
        guards: what the losses read beside their arguments.
        losses: inner and outer loss, by weak reference.
        checked: whether the program agreed with eager.
    """

    program: Any
    reason: str | None
    guards: Guards
    losses: tuple[Callable[[], Any], ...]
    checked: bool = False

    def fits(self, problem: Problem) -> bool:
        """Whether it was made for these losses and what they read."""
        inner, outer = self.losses
        same = inner() is problem.inner_loss and outer() is problem.outer_loss
        return same and self.guards.hold()

    def refuse(self, reason: str) -> None:
        """Give the program up."""
        self.program, self.reason = None, reason


class Cache:
    """Programs by problem and key, the least recently used one forgotten first.

    Args:
        size: programs kept.
        per_source: programs compiled for losses that come from the same lines of source, before
            such losses stay eager: functions made anew at each call, and shapes that never come
            back, would cost a compilation each time.
    """

    def __init__(self, size: int = 64, per_source: int = 8) -> None:
        self.size = size
        self.per_source = per_source
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._made: Counter[tuple[types.CodeType, ...]] = Counter()

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._made.clear()

    def get(self, problem: Problem, key: Hashable, build: Callable[[], Any]) -> tuple[Entry, float]:
        """Return the entry of a problem and key, and the seconds spent to make it.

        Args:
            problem: whose losses it is for.
            key: everything else that it depends on.
            build: makes the program; may raise a CannotCompileError, which is remembered.

        Raises:
            CannotCompileError: too many were made for losses from the same source.
        """
        place = (id(problem.inner_loss), id(problem.outer_loss), key)
        entry = self._entries.get(place)
        if entry is not None and entry.fits(problem):
            self._entries.move_to_end(place)
            return entry, 0.0
        begin = time.perf_counter()
        guards = Guards(problem.inner_loss, problem.outer_loss)
        if self._made[guards.codes] >= self.per_source:
            raise CannotCompileError(
                f"{self.per_source} programs were compiled for losses from the same source "
                "already: pass the same functions and the same shapes from call to call"
            )
        self._made[guards.codes] += 1
        losses = (self._watch(problem.inner_loss, place), self._watch(problem.outer_loss, place))
        try:
            entry = Entry(build(), None, guards, losses)
        except CannotCompileError as error:
            entry = Entry(None, str(error), guards, losses)
        self._entries[place] = entry
        while len(self._entries) > self.size:
            self._entries.popitem(last=False)
        return entry, time.perf_counter() - begin

    def _watch(self, loss: Any, place: Hashable) -> Callable[[], Any]:
        """Return a weak reference that drops the entry, or a strong one where there is none."""
        try:
            return weakref.ref(loss, lambda _: self._entries.pop(place, None))
        except TypeError:
            return lambda: loss


PROGRAMS = Cache()
"""The programs of this process."""
