"""One run of the inner loop that can be differentiated in reverse: forward pass and pullback."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hypergrad.memory import SHARE, Footprint, fitting_length, free_bytes, nbytes
from hypergrad.optimizers.base import State, vectors
from hypergrad.optimizers.flat import widen
from hypergrad.optimizers.values import Values
from hypergrad.randomness import RandomState
from hypergrad.tape import Adjoint, Record, Segment, Tape
from hypergrad.tree import Tree

__all__ = ["Pulled", "Trajectory", "trace"]


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
    length: int | None,
) -> Trajectory:
    """Take T inner steps from the tape's params, the last K differentiable.

    Args:
        tape: takes the steps.
        values: resolved hyperparameters of the optimizer, with their graph.
        optimizer_state: to continue from; None starts anew.
        steps: T.
        window: K ≤ T.
        length: of a segment; its graphs are held together, and those of the last segment from
            the start.  None measures the first differentiable step, and chooses.
    """
    loop, first = tape.loop, steps - window
    flat, state = loop.start(optimizer_state)
    for t in range(first):
        _, flat, state = loop.step(t, flat, state)
    records: list[Record] = []
    tried = 0
    if length is None:
        random = RandomState.capture(tape.devices)
        footprint = Footprint(flat, tape.hyper.tensors, loop.held())
        with footprint.watched():
            records, _, after, state_after = tape.record(first, first + 1, flat, state)
        size = nbytes([flat, *vectors(state_after).values()])
        length = fitting_length(window, footprint.bytes, size, SHARE * free_bytes(flat.device))
        if length == window:
            flat, state = after, state_after
        else:
            random.restore()
            records, tried = [], 1

    segments: list[Segment] = []
    begin = first
    while begin + length < steps:
        segment, flat, state = tape.run(begin, begin + length, flat, state)
        segments.append(segment)
        begin += length
    rest, _, flat, state = tape.record(begin + len(records), steps, flat, state)
    n_grad = steps + begin - first + tried
    return Trajectory(tape, values, flat, state, segments, records + rest, n_grad)
