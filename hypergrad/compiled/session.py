"""One call of an estimator with compiled programs: the check against eager, the way back to it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
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

__all__ = ["Arguments", "Session", "run"]


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


class Compute(Protocol):
    """A compiled form of an estimator."""

    def __call__(
        self, estimator: Any, arguments: Arguments, session: Session
    ) -> tuple[Hypergradient, Any] | None:
        """Return what the estimator returns, or None where something is not finite.

        Raises:
            CannotCompileError: there is no compiled form, with the reason.
        """


def run(estimator: Any, compute: Compute, arguments: Arguments) -> tuple[Hypergradient, Any]:
    """Call an estimator in its compiled form, or eagerly with the reason why not.

    A program's first result is compared with the eager one.  Where anything is not finite, the
    eager call tells the step and the tensor.
    """
    session, eager = Session(), replace(estimator, compile="off")
    try:
        found = compute(estimator, arguments, session)
        if found is None:
            raise CannotCompileError("a number was not finite, but is in eager mode")
        if not all([entry.checked for entry in session.entries]):
            _check(session.entries, found[0], eager, arguments)
    except CannotCompileError as error:
        expected, state = arguments.call(eager)
        report = CompileReport(estimator.compile, session.seconds, False, 0, str(error))
        return replace(expected, compiled=report), state
    cached = session.seconds == 0.0
    report = CompileReport(estimator.compile, session.seconds, cached, session.eager_steps)
    return replace(found[0], compiled=report), found[1]


def _check(entries: list[Entry], found: Hypergradient, eager: Any, arguments: Arguments) -> None:
    """Compare a first result with the eager one.

    Raises:
        CannotCompileError: they differ by more than rounding explains; the programs are refused.
    """
    expected, _ = arguments.call(eager)
    tolerance = float(torch.finfo(expected.value.dtype).eps) ** 0.5
    error = _difference(found, expected)
    if not error <= tolerance:
        # Long unrolls and unfinished solves magnify rounding; see by how much.
        nudged = replace(arguments, params=optree.tree_map(_nudge, arguments.params))
        noise = _difference(nudged.call(eager)[0], expected)
        if not error <= 10 * noise:
            reason = (
                f"its first result differed from the eager one by {error:.1e} (tolerance "
                f"{tolerance:.1e}; rounding of params alone makes {noise:.1e})"
            )
            for entry in entries:
                entry.refuse(reason)
            raise CannotCompileError(reason)
    for entry in entries:
        entry.checked = True


def _difference(found: Hypergradient, expected: Hypergradient) -> float:
    """Largest relative difference of the values and of the hypergradients."""
    pairs = (
        (found.value.double(), expected.value.double()),
        (_vector(found.grad), _vector(expected.grad)),
    )
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs]
    return float(torch.tensor(errors).max())


def _vector(tree: Tree) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in optree.tree_leaves(tree)])


def _nudge(tensor: Tensor) -> Tensor:
    """Move every second entry by a rounding error."""
    if not tensor.is_floating_point() or not tensor.requires_grad:
        return tensor
    sign = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape) % 2
    eps = torch.finfo(tensor.dtype).eps
    return (tensor.detach() * (1 + eps * sign)).requires_grad_()
