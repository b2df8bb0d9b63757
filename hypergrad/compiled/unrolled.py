"""`Unrolled` by compiled chunks of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hypergrad.compiled.chunk import Chunk, Form, Given, build, optimizer_key
from hypergrad.compiled.forms import StateForm, ValueForm, is_settled, settled
from hypergrad.compiled.layout import Layout, split_params, split_tree
from hypergrad.compiled.report import CannotCompileError
from hypergrad.compiled.session import Arguments, Session
from hypergrad.estimator import Hypergradient
from hypergrad.memory import SHARE, fitting_length, free_bytes, nbytes
from hypergrad.optimizers.base import State
from hypergrad.optimizers.flat import flatten, widen
from hypergrad.optimizers.values import constants
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem
from hypergrad.status import Status
from hypergrad.tape import Adjoint, Record, Tape, accumulate
from hypergrad.training import Loop, UnrolledState, check_optimizer, detached
from hypergrad.trajectory import Pulled
from hypergrad.tree import Leaves, hyper_leaves, trainable_leaves

if TYPE_CHECKING:
    from hypergrad.unrolled import Unrolled

__all__ = ["NotFiniteError", "Run", "unrolled"]

CHUNKS = range(5, 9)
"""Lengths of a chunk to choose from: longer ones take longer to compile than they save."""


@dataclass
class _Piece:
    """Some steps of a run: a compiled chunk, or eager ones.

    Attributes:
        begin: number of the first step.
        end: number of the step after the last one.
        chunk: compiled; None for eager steps.
        losses: met on the way, to compare when recomputed.
        kept: what the pullback of a chunk needs.
        records: what the pullback of eager steps needs.
    """

    begin: int
    end: int
    chunk: Chunk | None
    losses: Tensor
    kept: list[Tensor]
    records: list[Record]


@dataclass
class _Group:
    """Pieces that are held together, and where they start, to run them again."""

    flat: Tensor
    state: State
    pieces: list[_Piece]


class NotFiniteError(Exception):
    """Something to be found by the eager call."""


def unrolled(
    estimator: Unrolled, arguments: Arguments, session: Session
) -> tuple[Hypergradient, UnrolledState] | None:
    """Differentiate through the inner optimization by compiled chunks; see `Compute`."""
    leaves, hyper = trainable_leaves(arguments.params), hyper_leaves(arguments.hparams)
    level = (arguments.problem, leaves, hyper, arguments.inner_batch, arguments.state["optimizer"])
    try:
        run = Run(estimator, *level, session=session)
        return run.hypergradient(arguments.outer_batch)
    except NotFiniteError:
        return None


class Run:
    """One call of `Unrolled`."""

    def __init__(
        self,
        estimator: Unrolled,
        problem: Problem,
        leaves: Leaves,
        hyper: Leaves,
        inner_batch: Any,
        optimizer_state: State | None,
        session: Session,
    ) -> None:
        self.estimator, self.hyper, self.session = estimator, hyper, session
        optimizer = check_optimizer("Unrolled", estimator.optimizer)
        with torch.enable_grad():
            self.values = optimizer.resolve(self.hyper.tree(), leaves)
        fixed, h = constants(self.values), detached(self.hyper)
        self.loop = Loop(problem, leaves, h, optimizer, fixed, inner_batch)
        self.tape = Tape(self.loop, self.hyper)
        self.first = estimator.steps - (estimator.truncation or estimator.steps)
        self.length = _length(estimator.compile, estimator.steps - self.first)

        flat, state = self.loop.start(optimizer_state)
        if flat.dtype not in (torch.float32, torch.float64):
            raise CannotCompileError(f"inductor rounds {flat.dtype} differently from eager")
        state = settled(optimizer, flat, state, self.values)
        self.flat, self.state = flat, state
        self.starting = not is_settled(optimizer, flat, state, self.values)
        self.chunks: dict[Layout, Chunk] = {}
        self.shared: tuple[list[Tensor], Layout] | None = None
        value_form = ValueForm.of(self.values, fixed)
        _, constant, params = split_params(leaves.tree())
        h_tensors, hyper_layout = split_tree(h.tree(), "hparams", tie=False)
        packed = value_form.pack(fixed, flat.device)
        self.given = Given([flat], [], packed, constant, h_tensors, [])
        self.form = Form(
            self.length,
            not callable(inner_batch),
            optimizer_key(optimizer),
            params,
            hyper_layout,
            None,
            StateForm.of(state),
            value_form,
        )

    def hypergradient(self, outer_batch: Any) -> tuple[Hypergradient, UnrolledState]:
        """Run forward, differentiate the outer loss, and pull back."""
        flat, state = self.forward()
        at, problem = self.loop.at(flat), self.loop.problem
        value, w_bar, direct = outer_gradients(problem, at, self.hyper, outer_batch)
        pulled = self.pullback(flatten(w_bar))
        steps, window = self.estimator.steps, self.estimator.steps - self.first
        hypergradient = Hypergradient(
            value=value,
            grad=total_gradient(self.hyper, direct, pulled.hyper, ", nor the optimizer"),
            params=self.loop.params(flat),
            residual=None,
            error_bound=None,
            n_hvp=window,
            n_grad=steps + 1 + self.recomputed,
            status=Status.EXACT if window == steps else Status.APPROXIMATE,
        )
        return hypergradient, {"optimizer": state}

    def forward(self) -> tuple[Tensor, State]:
        """Take all steps; returns w_T and the state of the optimizer.

        Raises:
            CannotCompileError: no step runs compiled, or a program cannot be made.
        """
        steps, flat, state = self.estimator.steps, self.flat, self.state
        for piece in self._plan(0, self.first):
            flat, state = self._forward(piece, flat, state, record=False)
        self.groups: list[_Group] = []
        pieces = list(self._plan(self.first, steps))
        length: int | None = None
        while pieces:
            group = _Group(flat, state, [])
            self.groups.append(group)
            while pieces and (length is None or len(group.pieces) < length):
                piece = pieces.pop(0)
                flat, state = self._forward(piece, flat, state, record=True)
                group.pieces.append(piece)
                if piece.chunk is not None and length is None:
                    length = self._group_length(piece, len(pieces) + 1)
            if pieces:
                for piece in group.pieces:
                    piece.kept, piece.records = [], []
        if not self.chunks:
            raise CannotCompileError(
                f"no {self.length} consecutive steps have batches of one shape and a settled "
                'optimizer state; compile="step" needs one'
            )
        return flat, self.form.state.plain(state)

    def pullback(self, w_bar: Tensor) -> Pulled:
        """Walk back from w̄, once."""
        adjoint = Adjoint(self.tape, self.values, widen(w_bar))
        self.recomputed = 0
        while self.groups:
            group = self.groups.pop()
            if not (group.pieces[-1].kept or group.pieces[-1].records):
                self.recomputed += group.pieces[-1].end - group.pieces[0].begin
                self._again(group)
            while group.pieces:
                self._pull(group.pieces.pop(), adjoint)
        return Pulled(adjoint.indirect(), adjoint.flat_bar)

    def _plan(self, begin: int, end: int) -> Iterator[_Piece]:
        """Yield the steps that fill no chunk, and then chunks."""
        rest = begin + (end - begin) % self.length
        if begin == 0 and self.starting and rest == begin < end:
            rest = begin + self.length
        nothing = self.flat.new_empty(0)
        for i, j in ((begin, rest), *((t, t + self.length) for t in range(rest, end, self.length))):
            if i < j:
                yield _Piece(i, j, None, nothing, [], [])

    def _forward(
        self, piece: _Piece, flat: Tensor, state: State, record: bool
    ) -> tuple[Tensor, State]:
        """Take the steps of a piece, and let it keep what its pullback needs."""
        whole = piece.end - piece.begin == self.length and not (piece.begin == 0 and self.starting)
        batches, layout = self._batches(piece) if whole else ([], None)
        if layout is None:
            return self._eagerly(piece, flat, self.form.state.plain(state), record)
        given = self.given._replace(
            flat=[flat], state=self.form.state.pack(state, flat.device), batches=batches
        )
        piece.chunk = self._chunk(layout, given)
        (flat, *ends, piece.losses, finite), kept = piece.chunk.forward(given.tensors)
        if not finite:
            raise NotFiniteError
        piece.kept = kept if record else []
        return flat, self.form.state.unpack(ends)

    def _eagerly(
        self, piece: _Piece, flat: Tensor, state: State, record: bool
    ) -> tuple[Tensor, State]:
        self.session.eager_steps += piece.end - piece.begin
        if record:
            piece.records, losses, flat, state = self.tape.record(
                piece.begin, piece.end, flat, state
            )
            piece.losses = torch.stack(losses)
        else:
            for t in range(piece.begin, piece.end):
                _, flat, state = self.loop.step(t, flat, state)
        self.form = self.form._replace(state=StateForm.of(state))
        return flat, state

    def _batches(self, piece: _Piece) -> tuple[list[Tensor], Layout | None]:
        """Return the batches of a chunk and what they look like; None where they differ."""
        if self.form.shared:
            if self.shared is None:
                self.shared = split_tree(self.loop.batch, "inner_batch")
            return self.shared
        tensors, layout = split_tree(self.loop.batch_at(piece.begin), "inner_batch")
        for t in range(piece.begin + 1, piece.end):
            more, other = split_tree(self.loop.batch_at(t), "inner_batch")
            if other != layout:
                return [], None
            tensors += more
        return tensors, layout

    def _chunk(self, layout: Layout, given: Given) -> Chunk:
        if layout not in self.chunks:
            form = self.form._replace(batch=layout)
            self.chunks[layout] = self.session.program(
                self.loop.problem,
                form,
                lambda: build(self.loop.problem, self.loop.optimizer, form, given),
            )
        return self.chunks[layout]

    def _group_length(self, piece: _Piece, count: int) -> int:
        """Return how many pieces to hold at a time, judged by the first of `count` ones."""
        window = self.estimator.steps - self.first
        match self.estimator.memory:
            case "graph":
                return count
            case "replay":
                return 1
            case "segments":
                steps = self.estimator.segment or math.isqrt(window)
                return max(1, round(steps / self.length))
        inputs = {id(t) for t in self.given.tensors}
        held = nbytes(t for t in piece.kept if id(t) not in inputs)
        size = nbytes([self.flat]) * (1 + len(self.form.state.vectors))
        return fitting_length(count, held, size, SHARE * free_bytes(self.flat.device))

    def _again(self, group: _Group) -> None:
        """Take the steps of a group again, and keep what their pullback needs."""
        flat, state, counted = group.flat, group.state, self.session.eager_steps
        for piece in group.pieces:
            before = piece.losses
            flat, state = self._forward(piece, flat, state, record=True)
            if not torch.equal(before, piece.losses):
                raise NotFiniteError  # the eager call names the step whose loss differs
        self.session.eager_steps = counted

    def _pull(self, piece: _Piece, adjoint: Adjoint) -> None:
        """Take adjoints back over a piece."""
        if piece.chunk is None or piece.records:
            adjoint.walk(piece.records)
            return
        names, tuned = self.form.state.vectors, self.form.values.tuned
        flat_bar = adjoint.flat_bar
        state_bars = [adjoint.state_bar.get(k, torch.zeros_like(flat_bar)) for k in names]
        found = list(piece.chunk.backward([*piece.kept, flat_bar, *state_bars]))
        adjoint.flat_bar, ends, finite = found[0], found[1 : 1 + len(names)], found[1 + len(names)]
        if not finite:
            raise NotFiniteError
        adjoint.state_bar = dict(zip(names, ends, strict=True))
        rest = iter(found[2 + len(names) :])
        for key in tuned:
            bar, before = next(rest), adjoint.value_bars.get(key)
            adjoint.value_bars[key] = bar if before is None else before + bar
        through = [next(rest) if enters else None for enters in piece.chunk.enters]
        adjoint.hyper_bars = accumulate(adjoint.hyper_bars, through)


def _length(mode: str, window: int) -> int:
    """Return the steps of a chunk: a length that divides a window well."""
    if mode == "step":
        return 1
    if window < CHUNKS.start:
        return window
    return min(CHUNKS, key=lambda length: (window % length, length))
