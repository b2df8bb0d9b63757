"""One run of the inner loop that can be differentiated in reverse: forward pass and pullback."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hypergrad.optimizers.base import State
from hypergrad.optimizers.flat import widen
from hypergrad.optimizers.values import Values
from hypergrad.randomness import RandomState
from hypergrad.tape import Adjoint, Record, Segment, Tape
from hypergrad.tree import Tree

__all__ = ["Memory", "Pulled", "Trajectory", "trace"]

Memory = Literal["graph", "replay", "segments"]


@dataclass(frozen=True)
class Pulled:
    """Adjoints at the ends of a trajectory.

    Attributes:
        hyper: (dw_T/dh)ᵀ w̄ for each leaf of hparams; None where h was not met.
        start: (dw_T/dw₀)ᵀ w̄ as a flat vector, at least float32.
    """

    hyper: list[Tensor | None]
    start: Tensor


@dataclass
class Trajectory:
    """T inner steps, the last K of them differentiable, once.

    Attributes:
        tape: what took the steps.
        values: resolved hyperparameters of the optimizer, with their graph.
        flat: w_T, shape (d,).
        state: state of the optimizer there.
        segments: steps to be taken again, in order.
        records: the steps after them, with their graphs.
        n_grad: gradient evaluations so far and in the pullback.
    """

    tape: Tape
    values: Values
    flat: Tensor
    state: State
    segments: list[Segment]
    records: list[Record]
    n_grad: int

    def params(self) -> Tree:
        """Return the tree over w_T, detached, with the caller's `requires_grad` marks."""
        return self.tape.loop.params(self.flat)

    def pullback(self, w_bar: Tensor) -> Pulled:
        """Walk back from w̄ = ∂L/∂w_T, shape (d,); frees every graph, so it can be called once.

        Raises:
            FloatingPointError: an adjoint is not finite; names the step and the tensor.
            RuntimeError: a recomputed step gave another loss.
        """
        adjoint = Adjoint(self.tape, self.values, widen(w_bar))
        adjoint.walk(self.records)
        if self.segments:
            with RandomState.capture(self.tape.devices).restored_after():
                while self.segments:
                    adjoint.walk(self.tape.replay(self.segments.pop()))
        return Pulled(adjoint.indirect(), adjoint.flat_bar)


def trace(
    tape: Tape,
    values: Values,
    optimizer_state: State | None,
    steps: int,
    window: int,
    memory: Memory,
) -> Trajectory:
    """Take `steps` inner steps from the tape's params, the last `window` differentiable."""
    loop = tape.loop
    first = steps - window
    length = {"graph": window, "replay": 1, "segments": math.isqrt(window)}[memory]
    begins = range(first, steps, length)
    flat, state = loop.start(optimizer_state)
    for t in range(first):
        _, flat, state = loop.step(t, flat, state)
    segments = []
    for begin in begins[:-1]:
        segment, flat, state = tape.run(begin, begin + length, flat, state)
        segments.append(segment)
    records, _, flat, state = tape.record(begins[-1], steps, flat, state)
    return Trajectory(tape, values, flat, state, segments, records, steps + begins[-1] - first)
