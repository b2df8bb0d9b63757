"""Optimizer states and hyperparameters as inputs of a graph."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hypergrad.compiled.report import CannotCompileError
from hypergrad.optimizers import Optimizer
from hypergrad.optimizers.base import State, vectors
from hypergrad.optimizers.values import Values, constants, double_dtype, tuned

__all__ = ["StateForm", "ValueForm", "is_settled", "settled"]


def _tensor(value: float | Tensor, device: torch.device) -> Tensor:
    """Return a number as a tensor in double precision, as numbers are."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=double_dtype(device), device=device)


class StateForm(NamedTuple):
    """An optimizer state as tensors: its counters become double-precision scalars.

    A counter is an input of the graph, never a constant in it.

    Attributes:
        vectors: names of the floating tensors.
        counters: names of the numbers.
        rest: the other entries.
    """

    vectors: tuple[str, ...]
    counters: tuple[str, ...]
    rest: tuple[tuple[str, Hashable], ...]

    @classmethod
    def of(cls, state: State) -> StateForm:
        """Describe a state."""
        floating = tuple(vectors(state))
        counters = tuple([k for k, v in state.items() if type(v) is int])
        taken = {*floating, *counters}
        rest = tuple([(k, v) for k, v in state.items() if k not in taken])
        return cls(floating, counters, rest)

    def pack(self, state: State, device: torch.device) -> list[Tensor]:
        """Return the tensors of a state.

        Raises:
            CannotCompileError: its other entries are not those of this form.
        """
        if any(state[k] is not v for k, v in self.rest):
            raise CannotCompileError("the optimizer state changes its form from step to step")
        names = (*self.vectors, *self.counters)
        return [_tensor(state[k], device) for k in names]

    def unpack(self, tensors: Sequence[Tensor]) -> State:
        """Return the state, with the counters as tensors."""
        names = (*self.vectors, *self.counters)
        return {**dict(self.rest), **dict(zip(names, tensors, strict=True))}

    def plain(self, state: State) -> State:
        """Return the state with its counters as numbers again."""
        return {k: int(v) if k in self.counters else v for k, v in state.items()}


class ValueForm(NamedTuple):
    """Optimizer hyperparameters: numbers stay constants of the graph unless they are tuned.

    Attributes:
        tuned: names of those that depend on hparams.
        tensors: names of the other tensors.
        numbers: the rest.
    """

    tuned: tuple[str, ...]
    tensors: tuple[str, ...]
    numbers: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, values: Values, constants: Values) -> ValueForm:
        """Describe values, given with their graph and without."""
        moving = tuple(tuned(values))
        rest = {k: v for k, v in constants.items() if k not in moving}
        tensors = tuple([k for k, v in rest.items() if isinstance(v, Tensor)])
        return cls(moving, tensors, tuple([(k, v) for k, v in rest.items() if k not in tensors]))

    def pack(self, constants: Values, device: torch.device) -> list[Tensor]:
        """Return the tensors among the values; a tuned number as a double-precision scalar."""
        return [_tensor(constants[k], device) for k in (*self.tuned, *self.tensors)]

    def unpack(self, tensors: Sequence[Tensor]) -> Values:
        """Return the values, with tensors for the tuned ones."""
        names = (*self.tuned, *self.tensors)
        return {**dict(zip(names, tensors, strict=True)), **dict(self.numbers)}


def settled(optimizer: Optimizer, flat: Tensor, state: State, values: Values) -> State:
    """Return the state with zeros for each buffer that is still to come, if that is the same.

    Momentum that starts undampened starts as if from zero; with dampening it does not.
    """
    fixed, wanted = constants(values), list(tuned(values))
    generator = torch.Generator(flat.device).manual_seed(0)
    grad, bar = (
        torch.randn(flat.shape, generator=generator, dtype=flat.dtype, device=flat.device)
        for _ in range(2)
    )

    def act(start: State) -> list[Tensor]:
        after, end = optimizer.update(flat, grad, start, fixed)
        *bars, _, found = optimizer.adjoint(flat, grad, start, fixed, bar, {}, wanted)
        sums = [found[k].sum() if k in found else flat.new_zeros(()) for k in wanted]
        return [after, *vectors(end).values(), *bars, *sums]

    with torch.no_grad():
        _, end = optimizer.update(flat, grad, state, fixed)
        filled = {
            k: torch.zeros_like(flat) if v is None and isinstance(end[k], Tensor) else v
            for k, v in state.items()
        }
        if StateForm.of(filled) == StateForm.of(state):
            return state
        pairs = zip(act(state), act(filled), strict=True)
    return filled if all([torch.equal(a, b) for a, b in pairs]) else state


def is_settled(optimizer: Optimizer, flat: Tensor, state: State, values: Values) -> bool:
    """Whether the next step leaves a state of the same form."""
    with torch.no_grad():
        _, end = optimizer.update(flat, torch.zeros_like(flat), state, constants(values))
    return StateForm.of(end) == StateForm.of(state)
