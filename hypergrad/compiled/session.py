"""One call of an estimator with compiled programs: the check against eager, the way back to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import optree
import torch
from torch import Tensor

from hypergrad.compiled.cache import PROGRAMS, Entry
from hypergrad.compiled.report import CannotCompileError, CompileReport
from hypergrad.estimator import Hypergradient
from hypergrad.problem import Problem
from hypergrad.tree import Tree

__all__ = ["Arguments", "Session", "compare", "nudge", "numbers", "run"]


@dataclass(frozen=True)
class Arguments:
    """What an estimator is called with."""

    problem: Problem
    params: Tree
    hparams: Tree
    inner_batch: Any
    outer_batch: Any
    state: Any

    def call(self, estimator: Any) -> tuple[Hypergradient, Any]:
        """Call an estimator."""
        found: tuple[Hypergradient, Any] = estimator(
            self.problem,
            self.params,
            self.hparams,
            self.inner_batch,
            self.outer_batch,
            self.state,
        )
        return found


@dataclass
class Session:
    """What a call used.

    Attributes:
        entries: its programs.
        seconds: spent on tracing and compiling.
        eager_steps: inner steps taken eagerly.
    """

    entries: list[Entry] = field(default_factory=list)
    seconds: float = 0.0
    eager_steps: int = 0

    def program(self, problem: Problem, key: Hashable, build: Callable[[], Any]) -> Any:
        """Return a program, compiled if it is new.

        Raises:
            CannotCompileError: there is none, with the reason.
        """
        entry, seconds = PROGRAMS.get(problem, key, build)
        self.seconds += seconds
        if entry.reason is not None:
            raise CannotCompileError(entry.reason)
        self.entries.append(entry)
        return entry.program

    def settle(self, reason: str | None) -> None:
        """Mark the programs as right, or refuse them.

        Args:
            reason: what is wrong with their first result, or None.

        Raises:
            CannotCompileError: with the reason.
        """
        for entry in self.entries:
            entry.checked = True
            if reason is not None:
                entry.refuse(f"its first result was wrong: {reason}")
        if reason is not None:
            raise CannotCompileError(f"its first result was wrong: {reason}")


class Compute(Protocol):
    """A compiled form of an estimator."""

    def __call__(
        self, estimator: Any, arguments: Arguments, session: Session
    ) -> tuple[Hypergradient, Any] | None:
        """Return what the estimator returns, or None where something is not finite.

        Raises:
            CannotCompileError: there is no compiled form, with the reason.
        """


class Judge(Protocol):
    """A check of a program's first result."""

    def __call__(
        self, eager: Any, arguments: Arguments, found: Hypergradient, state: Any
    ) -> str | None:
        """Return what is wrong with it, or None."""


def run(
    estimator: Any, compute: Compute, judge: Judge, arguments: Arguments
) -> tuple[Hypergradient, Any]:
    """Call an estimator in its compiled form, or eagerly with the reason why not.

    Where anything is not finite, the eager call tells the step and the tensor.
    """
    session, eager = Session(), replace(estimator, compile="off")
    try:
        found = compute(estimator, arguments, session)
        if found is None:
            raise CannotCompileError("a number was not finite")
        if any(not entry.checked for entry in session.entries):
            session.settle(judge(eager, arguments, *found))
    except CannotCompileError as error:
        expected, state = arguments.call(eager)
        report = CompileReport(estimator.compile, session.seconds, False, 0, str(error))
        return replace(expected, compiled=report), state
    cached = session.seconds == 0.0
    report = CompileReport(estimator.compile, session.seconds, cached, session.eager_steps)
    return replace(found[0], compiled=report), found[1]


def compare(
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    nudged: Callable[[], Sequence[Tensor]] | None = None,
) -> str | None:
    """Say by how much results differ from eager ones, or None where rounding explains it.

    Args:
        found: tensors, each compared as a whole.
        expected: the eager ones.
        nudged: the eager ones with params moved by rounding errors, for computations that
            magnify rounding, as long unrolls do.
    """
    tolerance = float(torch.finfo(expected[0].dtype).eps) ** 0.5
    error = _difference(found, expected)
    if error <= tolerance:
        return None
    reason = f"it differs from the eager one by {error:.1e}, where {tolerance:.1e} passes"
    if nudged is not None:
        noise = _difference(nudged(), expected)
        if error <= 10 * noise:
            return None
        reason += f" and rounding of params makes {noise:.1e}"
    return reason


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative difference of two tensors."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs]
    return max(math.inf if math.isnan(error) else error for error in errors)


def numbers(found: Hypergradient) -> list[Tensor]:
    """Return F and dF/dh, each to be compared as a whole."""
    grads = [t.detach().double().reshape(-1) for t in optree.tree_leaves(found.grad)]
    return [found.value, torch.cat(grads)]


def nudge(tensor: Tensor) -> Tensor:
    """Move every second entry of a trained tensor by a rounding error."""
    if not tensor.requires_grad:
        return tensor
    odd = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape) % 2
    eps = torch.finfo(tensor.dtype).eps
    return (tensor.detach() * (1 + eps * odd.to(tensor))).requires_grad_()
