"""The steps of an inner loop, kept or recomputed, and the adjoint that walks back over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hypergrad.operators import vector_jacobian
from hypergrad.optimizers.base import Bars, State, vectors
from hypergrad.optimizers.flat import flatten, unflatten, widen
from hypergrad.optimizers.values import Values, tuned
from hypergrad.problem import check_finite, inner_gradient
from hypergrad.randomness import RandomState
from hypergrad.training import Loop, is_finite
from hypergrad.tree import Leaves, zeros_for_none

__all__ = ["Adjoint", "Record", "Segment", "Tape"]


class Record(NamedTuple):
    """One differentiable step: the point, the gradient with its graph, and its flat values."""

    t: int
    flat: Tensor
    state: State
    leaves: Sequence[Tensor]
    grads: Sequence[Tensor]
    grad: Tensor


class Segment(NamedTuple):
    """Some steps that can be taken again: where they started, and the losses they met."""

    begin: int
    end: int
    flat: Tensor
    state: State
    random: RandomState
    losses: list[Tensor]


@dataclass(frozen=True)
class Tape:
    """Takes inner steps so that they can be differentiated later.

    Attributes:
        loop: the inner loop.
        hyper: autograd leaves of the hyperparameters.
    """

    loop: Loop
    hyper: Leaves

    def record(
        self, begin: int, end: int, flat: Tensor, state: State
    ) -> tuple[list[Record], list[Tensor], Tensor, State]:
        """Take steps and keep their graphs; returns records, losses, and where it ended."""
        records, losses = [], []
        for t in range(begin, end):
            at = self.loop.at(flat)
            loss, grads = inner_gradient(
                self.loop.problem, at, self.hyper, self.loop.batch_at(t), f" at step {t}"
            )
            with torch.no_grad():
                grad = flatten(grads)
            records.append(Record(t, flat, state, at.tensors, grads, grad))
            losses.append(loss)
            flat, state = self.loop.move(t, flat, grad, state)
        return records, losses, flat, state

    def run(
        self, begin: int, end: int, flat: Tensor, state: State
    ) -> tuple[Segment, Tensor, State]:
        """Take steps and keep what is needed to take them again."""
        segment = Segment(begin, end, flat, state, RandomState.capture(self.devices), [])
        for t in range(begin, end):
            loss, flat, state = self.loop.step(t, flat, state)
            segment.losses.append(loss)
        return segment, flat, state

    def replay(self, segment: Segment) -> list[Record]:
        """Take the steps of a segment again, with graphs and the same random draws.

        Raises:
            RuntimeError: a loss differs from the one met before.
        """
        segment.random.restore()
        records, losses, _, _ = self.record(*segment[:4])
        for t, before, again in zip(
            range(segment.begin, segment.end), segment.losses, losses, strict=True
        ):
            if not torch.equal(before, again):
                raise RuntimeError(
                    f"inner_loss at step {t} was {before.item()!r} and is {again.item()!r} when "
                    "recomputed. It must be a function of its arguments and of torch's global "
                    "random state, and a callable inner batch must return the same batch for the "
                    'same t; or use memory="graph", which recomputes nothing.'
                )
        return records

    @property
    def devices(self) -> set[torch.device]:
        """Where steps may draw random numbers."""
        return {t.device for t in (*self.loop.leaves.tensors, *self.hyper.tensors)}


@dataclass
class Adjoint:
    """Walks back over records from w̄ = ∂F/∂w, and sums what reaches the hyperparameters.

    Adjoints are kept in at least float32.

    Attributes:
        tape: where the records come from.
        values: resolved hyperparameters of the optimizer, with their graph.
        flat_bar: w̄ after the steps not yet walked.
        state_bar: adjoint of the optimizer state there.
        value_bars: adjoints of `values` so far.
        hyper_bars: h̄ through the inner loss so far, None where it was not used.
    """

    tape: Tape
    values: Values
    flat_bar: Tensor
    state_bar: Bars = field(default_factory=dict)
    value_bars: Bars = field(default_factory=dict)
    hyper_bars: list[Tensor | None] = field(default_factory=list)

    def walk(self, records: list[Record]) -> None:
        """Walk back over consecutive records, the last one first; each graph is freed when used."""
        while records:
            self._step(records.pop())

    def _step(self, record: Record) -> None:
        loop, hyper = self.tape.loop, self.tape.hyper
        self.flat_bar, grad_bar, self.state_bar, value_bars = loop.optimizer.adjoint(
            widen(record.flat),
            widen(record.grad),
            {**record.state, **{k: widen(v) for k, v in vectors(record.state).items()}},
            loop.values,
            self.flat_bar,
            self.state_bar,
            list(tuned(self.values)),
        )
        for key, bar in value_bars.items():
            self.value_bars[key] = self.value_bars[key] + bar if key in self.value_bars else bar

        bars = unflatten(grad_bar.to(record.flat.dtype), record.leaves)
        found = vector_jacobian(record.grads, [*record.leaves, *hyper.tensors], bars, keep=False)
        split = len(record.leaves)
        if any(f is not None for f in found):
            through = flatten(zeros_for_none(found[:split], record.leaves))
            self.flat_bar = self.flat_bar + widen(through)
            self.hyper_bars = accumulate(self.hyper_bars, found[split:])
        if not is_finite(self.flat_bar):
            pieces = unflatten(self.flat_bar, record.leaves)
            check_finite(pieces, loop.leaves.names, f"the adjoint of the params at step {record.t}")

    def indirect(self) -> list[Tensor | None]:
        """Return dF/dh without ∂F/∂h: through the inner loss and through the optimizer."""
        values = tuned(self.values)
        through: Sequence[Tensor | None] = [None] * len(self.tape.hyper.tensors)
        if values:
            bars = [
                self.value_bars[k].to(v) if k in self.value_bars else torch.zeros_like(v)
                for k, v in values.items()
            ]
            through = torch.autograd.grad(
                list(values.values()), self.tape.hyper.tensors, bars, allow_unused=True
            )
        return accumulate(self.hyper_bars, through)


def accumulate(
    sums: Sequence[Tensor | None], terms: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Add terms to sums in at least float32; None stands for nothing yet."""
    if not sums:
        return [None if t is None else widen(t) for t in terms]
    return [
        s if t is None else widen(t) if s is None else s + t
        for s, t in zip(sums, terms, strict=True)
    ]
