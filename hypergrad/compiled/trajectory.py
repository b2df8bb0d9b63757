"""A run of the inner loop by compiled chunks that can be differentiated in reverse."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypergrad.compiled.report import CannotCompileError, CompileReport
from hypergrad.compiled.session import Session
from hypergrad.compiled.unrolled import NotFiniteError, Run
from hypergrad.first_order import devices, replayed
from hypergrad.optimizers.base import State
from hypergrad.problem import Problem
from hypergrad.randomness import RandomState
from hypergrad.trajectory import Pulled, Trajectory
from hypergrad.tree import Leaves

if TYPE_CHECKING:
    from hypergrad.unrolled import Unrolled

__all__ = ["CompiledTrajectory"]


class CompiledTrajectory:
    """What `Unrolled.trace` returns, by compiled chunks, or eagerly with the reason why not.

    What a program computes first, w_T and the pullback, is compared with the eager results.

    Args:
        estimator: the unroll; its `compile` is not "off".
        problem, params, hparams, inner_batch, optimizer_state: as `Unrolled.trace` takes them.

    Attributes:
        flat: w_T.
        state: state of the optimizer there.
        report: what compiling did.
    """

    def __init__(
        self,
        estimator: Unrolled,
        problem: Problem,
        params: Leaves,
        hparams: Leaves,
        inner_batch: Any,
        optimizer_state: State | None,
    ) -> None:
        level = problem, params, hparams, inner_batch, optimizer_state
        self._estimator, self._level, self._session = estimator, level, Session()
        self._random = RandomState.capture(devices(params, hparams))
        self._eager: Trajectory | None = None
        self._run: Run | None = None
        reason = None
        try:
            run = Run(estimator, *level, self._session)
            self.flat, self.state = run.forward()
            if not all(entry.checked for entry in self._session.entries):
                eager = self._eager = self._trace()
                self._compare([self.flat], [eager.flat], lambda moved: [moved.flat])
            self._run = run
        except (CannotCompileError, NotFiniteError) as error:
            reason = str(error) or "a number was not finite, but is in eager mode"
            self._eager = self._eager or self._trace()
            self.flat, self.state = self._eager.flat, self._eager.state
        seconds, steps = self._session.seconds, self._session.eager_steps
        cached = reason is None and seconds == 0.0
        self.report = CompileReport(
            estimator.compile, seconds, cached, 0 if reason else steps, reason
        )

    def pullback(self, w_bar: Tensor) -> Pulled:
        """Walk back from w̄, once; see `Trajectory.pullback`."""
        with replayed(self._random):
            pulled = None
            if self._run is not None:
                with suppress(NotFiniteError):  # the eager one says where
                    pulled = self._run.pullback(w_bar)
            if pulled is None:
                return (self._eager or self._trace()).pullback(w_bar)
            return pulled if self._eager is None else self._checked(pulled, w_bar, self._eager)

    def _checked(self, pulled: Pulled, w_bar: Tensor, eager: Trajectory) -> Pulled:
        """Compare a first pullback with the eager one, and return what is right."""
        expected = eager.pullback(w_bar)
        try:
            ends = _ends(pulled), _ends(expected)
            self._compare(*ends, lambda moved: _ends(moved.pullback(w_bar)))
        except CannotCompileError as error:
            self.report = replace(self.report, reason=str(error))
            return expected
        for entry in self._session.entries:
            entry.checked = True
        return pulled

    def _trace(self, nudged: bool = False) -> Trajectory:
        problem, params, hparams, batch, state = self._level
        if nudged:
            params = replace(params, tensors=[_nudge(t) for t in params.tensors])
        self._random.restore()
        eager = replace(self._estimator, compile="off")
        return eager.trace(problem, params, hparams, batch, state)

    def _compare(
        self,
        found: list[Tensor],
        expected: list[Tensor],
        results: Callable[[Trajectory], list[Tensor]],
    ) -> None:
        """Compare results of programs with the eager ones.

        Raises:
            CannotCompileError: they differ by more than rounding explains; the programs are
                refused.
        """
        tolerance = torch.finfo(expected[0].dtype).eps ** 0.5
        error = _difference(found, expected)
        if error <= tolerance:
            return
        # Long unrolls magnify rounding; see by how much.
        noise = _difference(results(self._trace(nudged=True)), expected)
        if error <= 10 * noise:
            return
        reason = (
            f"its first result was wrong: it differs from the eager one by {error:.1e}, where "
            f"{tolerance:.1e} passes and rounding of params makes {noise:.1e}"
        )
        for entry in self._session.entries:
            entry.refuse(reason)
        raise CannotCompileError(reason)


def _ends(pulled: Pulled) -> list[Tensor]:
    return [pulled.start, *(bar for bar in pulled.hyper if bar is not None)]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative difference of two tensors."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    errors = [float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs]
    return max(math.inf if math.isnan(error) else error for error in errors)


def _nudge(tensor: Tensor) -> Tensor:
    """Move every second entry by a rounding error."""
    odd = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape) % 2
    return (tensor.detach() * (1 + torch.finfo(tensor.dtype).eps * odd.to(tensor))).requires_grad_()
