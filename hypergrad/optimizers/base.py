"""The optimizer contract: an update rule, its state, and its adjoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hypergrad.optimizers.flat import scale
from hypergrad.optimizers.values import Value, Values, resolve
from hypergrad.tree import Leaves, Tree

__all__ = ["Bars", "Optimizer", "State", "ValueBars", "vectors"]

State = dict[str, Any]
"""Optimizer state by name: vectors as long as the flat vector, counters, None."""

Bars = dict[str, Tensor]
"""Adjoints by name; a missing name means zero."""


@dataclass(frozen=True)
class Optimizer(ABC):
    """An update rule (w, s) ← U(w, ∇f, s; θ) on the flat vector w of all trained tensors.

    Subclasses are frozen dataclasses whose numeric fields θ (learning rate, momentum, ...) each
    are a number, a tensor, a `Hyper` that names an entry of hparams, or a tree of these: one
    value for all parameters, one per trained tensor (a tree that is a prefix of the params tree,
    or a vector with one entry per tensor), or one per element (a tree like params).
    """

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Half-open interval [low, high) of each hyperparameter."""

    @property
    @abstractmethod
    def hyperparameters(self) -> dict[str, Value]:
        """The numeric fields θ by name."""

    def resolve(self, hparams: Tree, params: Leaves) -> Values:
        """Look up every `Hyper` and broadcast every value to the flat vector.

        Raises:
            ValueError: an unknown name, a shape that does not fit, or a value out of range.
        """
        values = {k: resolve(k, v, hparams, params) for k, v in self.hyperparameters.items()}
        for key, value in values.items():
            self._check(key, value)
        return values

    def _check(self, key: str, value: float | Tensor) -> None:
        low, high = self.ranges.get(key, (-torch.inf, torch.inf))
        entries: list[float] = [value] if isinstance(value, float) else []
        if isinstance(value, Tensor):
            entries = [extreme.item() for extreme in torch.aminmax(value.detach())]
        for entry in entries:
            if not low <= entry < high:
                name = type(self).__name__
                raise ValueError(f"{name} {key} must be in [{low}, {high}), but got {entry}.")

    @abstractmethod
    def init(self, flat: Tensor) -> State:
        """Return the state before the first step at the flat vector `flat`."""

    @abstractmethod
    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """Take one step; pure, and differentiable in all tensors that it is given.

        Args:
            flat: w, shape (d,).
            grad: ∇f(w), shape (d,).
            state: from `init` or the last step.
            values: from `resolve`.

        Returns:
            The next w and state.
        """

    def adjoint(
        self,
        flat: Tensor,
        grad: Tensor,
        state: State,
        values: Values,
        out_bar: Tensor,
        state_bar: Bars,
        wanted: Collection[str],
    ) -> tuple[Tensor, Tensor, Bars, Bars]:
        """Pull adjoints back through one `update` (its vector-Jacobian product).

        Args:
            flat: w before the step.
            grad: ∇f(w).
            state: state before the step.
            values: as given to `update`, without a graph.
            out_bar: ∂L/∂(next w).
            state_bar: ∂L/∂(next state), by name.
            wanted: names of the values whose adjoint is needed; each is a number or a vector.

        Returns:
            ∂L/∂w, not through ∇f; ∂L/∂∇f; ∂L/∂state; ∂L/∂value of the wanted names.
        """
        with torch.enable_grad():
            start = {k: v.detach().requires_grad_() for k, v in vectors(state).items()}
            given = {
                k: torch.as_tensor(values[k], dtype=_dtype(values[k]), device=flat.device)
                .detach()
                .requires_grad_()
                for k in wanted
            }
            flat, grad = flat.detach().requires_grad_(), grad.detach().requires_grad_()
            out, after = self.update(flat, grad, {**state, **start}, {**values, **given})
            ends = {"": out, **vectors(after)}
            bars = {"": out_bar, **state_bar}
            used = [k for k in ends if k in bars and ends[k].requires_grad]
            inputs = [flat, grad, *start.values(), *given.values()]
            found = torch.autograd.grad(
                [ends[k] for k in used],
                inputs,
                [bars[k] for k in used],
                allow_unused=True,
                materialize_grads=True,
            )
        rest = iter(found[2:])
        state_found = dict(zip(start, rest, strict=False))
        return found[0], found[1], state_found, dict(zip(given, rest, strict=True))

    def start(self, state: State | None, flat: Tensor) -> State:
        """Return a given state, checked, or for None the one before the first step."""
        if state is None:
            return self.init(flat)
        self.check_state(state, flat)
        return state

    def check_state(self, state: State, flat: Tensor) -> None:
        """Check that a state belongs to this optimizer and to a vector like `flat`.

        Raises:
            ValueError: naming the entry that does not fit.
        """
        expected = self.init(flat)
        if set(state) != set(expected):
            raise ValueError(
                f"optimizer state has entries {sorted(state)}, but {type(self).__name__} keeps "
                f"{sorted(expected)}."
            )
        for key, value in vectors(state).items():
            like = expected[key]
            shape = like.shape if isinstance(like, Tensor) else flat.shape
            if value.shape != shape:
                raise ValueError(
                    f"optimizer state {key!r} has shape {tuple(value.shape)}, but these params "
                    f"need {tuple(shape)}; start anew with init for other params."
                )


def _dtype(value: float | Tensor) -> torch.dtype:
    return value.dtype if isinstance(value, Tensor) else torch.float64


def vectors(state: State) -> dict[str, Tensor]:
    """Return the floating tensors of a state: what a derivative passes through."""
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point()}


class ValueBars:
    """Collects the adjoints of the wanted values where each one multiplied a vector."""

    def __init__(self, values: Values, wanted: Collection[str]) -> None:
        self.values = values
        self.wanted = wanted
        self.bars: Bars = {}

    def __contains__(self, key: str) -> bool:
        return key in self.wanted

    def add(
        self, key: str, bar: Tensor, factor: Tensor | float, times: float | Tensor = 1.0
    ) -> None:
        """Add times·bar·factor to the adjoint of `key`: elementwise, or summed for a number."""
        if key not in self.wanted:
            return
        if isinstance(times, Tensor):
            bar, times = scale(bar, times), 1.0
        if isinstance(self.values[key], Tensor):
            term = bar * factor
        elif isinstance(factor, Tensor):
            term = torch.dot(bar, factor)
        else:
            term = bar.sum() * factor
        if times != 1.0:
            term = term * times
        self.bars[key] = self.bars[key] + term if key in self.bars else term
