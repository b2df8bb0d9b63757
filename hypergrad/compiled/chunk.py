"""Some inner steps and their adjoints as two compiled graphs."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from hypergrad.compiled.forms import StateForm, ValueForm
from hypergrad.compiled.graph import Graph, compile_graph, trace
from hypergrad.compiled.layout import Groups, Layout, ParamsLayout
from hypergrad.compiled.partition import Early, split
from hypergrad.optimizers import Optimizer
from hypergrad.problem import Problem
from hypergrad.tape import Adjoint, Tape
from hypergrad.training import Loop
from hypergrad.tree import Leaves

__all__ = ["Chunk", "Form", "Given", "build", "optimizer_key"]


class Given(NamedTuple):
    """What a chunk starts from, as tensors."""

    flat: list[Tensor]
    state: list[Tensor]
    values: list[Tensor]
    constant: list[Tensor]
    hyper: list[Tensor]
    batches: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [t for part in self for t in part]


class Form(NamedTuple):
    """Everything else that a chunk's graphs depend on; hashable.

    Attributes:
        steps: C.
        shared: whether all steps take the same batch.
        optimizer: see `optimizer_key`.
        params: layout of params.
        hyper: layout of hparams.
        batch: layout of the batches, equal for all steps.
        state: form of the optimizer state.
        values: form of the optimizer hyperparameters.
    """

    steps: int
    shared: bool
    optimizer: Hashable
    params: ParamsLayout
    hyper: Layout
    batch: Layout | None
    state: StateForm
    values: ValueForm


@dataclass(frozen=True)
class Chunk:
    """C steps: the compiled forward pass, and its compiled pullback.

    Attributes:
        forward: `Given` -> w, state, losses and a flag of finiteness; and what backward keeps.
        backward: (that, w̄, s̄) -> w̄, s̄, a flag of finiteness, adjoints of the tuned values, and
            of the hyperparameters that enter f.
        enters: which hyperparameters enter f.
    """

    forward: Early
    backward: Graph
    enters: tuple[bool, ...]


def build(problem: Problem, optimizer: Optimizer, form: Form, given: Given) -> Chunk:
    """Trace C steps of the tape and of its adjoint, and compile both."""
    groups = Groups(*given)
    enters: list[bool] = []

    def everything(*tensors: Tensor) -> list[Tensor]:
        (flat,), state, values, constant, hyper, batches = groups.split(tensors)
        bars = list(tensors[sum(groups.sizes) :])
        start = form.state.unpack(state)
        fixed = form.values.unpack(values)
        moving = {k: fixed[k].detach().requires_grad_() for k in form.values.tuned}
        shapes = [flat.new_empty(shape) for shape in form.params.shapes]
        leaves = form.params.leaves(shapes, constant)
        names = [f"hparams[{i}]" for i in range(len(hyper))]
        h = Leaves([t.detach().requires_grad_() for t in hyper], names, form.hyper.rebuild)
        size = len(form.batch.tensors)

        def batch(t: int) -> Any:
            begin = 0 if form.shared else t * size
            return form.batch.rebuild(batches[begin : begin + size])

        tape = Tape(Loop(problem, leaves, h, optimizer, fixed, batch), h)
        records, losses, after, state_after = tape.record(0, form.steps, flat, start)
        ends = form.state.pack(state_after, flat.device)
        stacked = torch.stack(losses)
        finite = stacked.isfinite().all() & after.isfinite().all()
        adjoint = Adjoint(tape, moving, bars[0], dict(zip(form.state.vectors, bars[1:], strict=True)))
        adjoint.walk(records)
        enters[:] = [bar is not None for bar in adjoint.hyper_bars] or [False] * len(hyper)
        return [
            after, *ends, stacked, finite,
            adjoint.flat_bar,
            *(adjoint.state_bar.get(k, torch.zeros_like(flat)) for k in form.state.vectors),
            adjoint.flat_bar.isfinite().all(),
            *(_like(adjoint.value_bars.get(k), moving[k]) for k in form.values.tuned),
            *(bar for bar in adjoint.hyper_bars if bar is not None),
        ]

    inputs = given.tensors
    bars = [t.clone() for t in (given.flat[0], *given.state[: len(form.state.vectors)])]
    traced = trace(everything, [*inputs, *bars])
    forward, late = split(traced, len(inputs), 3 + len(given.state))
    with torch.no_grad():
        _, kept = forward(inputs)
    return Chunk(forward, compile_graph(trace(late, [*kept, *bars])), tuple(enters))


def _like(bar: Tensor | None, value: Tensor) -> Tensor:
    """Return an adjoint in the shape of its value: the hand-written ones may be elementwise."""
    if bar is None:
        return torch.zeros_like(value)
    return bar.sum() if value.dim() < bar.dim() else bar


def optimizer_key(optimizer: Optimizer) -> Hashable:
    """Return what of an optimizer is a constant in a graph; tensors are not."""
    flat, spec = optree.tree_flatten({f.name: getattr(optimizer, f.name) for f in fields(optimizer)})
    leaves = [type(v) if isinstance(v, Tensor) else (type(v), v) for v in flat]
    return type(optimizer), spec, tuple(leaves)
