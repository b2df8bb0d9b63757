"""Update rules made from update rules: edited gradients and scheduled hyperparameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from bilevel.coordinates import interpolate
from bilevel.domains import Grad
from hypergrad.optimizers import Hyper, Optimizer, State, Value, Values

__all__ = ["Annealed", "EditedGradient", "Knots", "Wrapped"]


@dataclass(frozen=True)
class Wrapped(Optimizer):
    """An update rule around another, with the hyperparameters and the state of that one.

    Attributes:
        base: the rule U.
    """

    base: Optimizer

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """Those of the rule."""
        return self.base.hyperparameters

    def init(self, flat: Tensor) -> State:
        """See `Optimizer.init`."""
        return self.base.init(flat)


@dataclass(frozen=True)
class EditedGradient(Wrapped):
    """w, s ← U(w, e(∇f(w), w), s): an update rule on an edited gradient.

    The edit is differentiated with the rule, so hypergradients through training are exact.

    Attributes:
        edit: e, ``(grad, flat) -> grad`` on flat vectors; pure and differentiable.
    """

    edit: Callable[[Tensor, Tensor], Tensor]

    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """See `Optimizer.update`."""
        return self.base.update(flat, self.edit(grad, flat), state, values)


@dataclass(frozen=True)
class Knots:
    """Stands in an optimizer field for a value that follows a schedule; see `Annealed`.

    Attributes:
        domain: a `Grad` with a schedule.
        values: what an optimizer field takes, for each knot.
    """

    domain: Grad
    values: tuple[Value, ...]

    @classmethod
    def of(cls, domain: Grad, value: Hyper | Tensor) -> Knots:
        """Return the knots of a tuned hyperparameter, or of a constant tensor."""
        count = cast(int, domain.schedule)
        if isinstance(value, Hyper):
            return cls(domain, tuple(Hyper(value.name, _Select(i)) for i in range(count)))
        return cls(domain, tuple(v if v.dim() else v.item() for v in value.unbind()))

    def at(self, given: Sequence[float | Tensor], progress: float) -> float | Tensor:
        """Interpolate between resolved knots; differentiable."""
        # By now a knot is one number, or spread over the flat vector.
        like = next(
            (k for k in given if isinstance(k, Tensor)), torch.zeros((), dtype=torch.float64)
        )
        knots = torch.stack(
            [torch.as_tensor(knot, dtype=like.dtype, device=like.device) for knot in given]
        )
        inside = float(torch.tensor(self.domain.init, dtype=torch.float64).flatten()[0])
        spread = dataclasses.replace(self.domain, init=inside, shape=tuple(like.shape))
        value = interpolate(spread, knots, progress)
        return value.item() if all(isinstance(knot, float) for knot in given) else value


@dataclass(frozen=True)
class _Select:
    """Selects a knot; a frozen object, so that equal rules compare equal."""

    index: int

    def __call__(self, knots: Tensor) -> Tensor:
        return knots[self.index]


@dataclass(frozen=True)
class Annealed(Optimizer):
    """An update rule some of whose fields are `Knots`: step t uses them at t / horizon.

    Hypergradients reach every knot.  The optimizer state counts the steps.

    Attributes:
        base: the rule.
        horizon: steps that the knots span; the last one stays in force afterwards.
        done: steps done before the first one of this rule.
    """

    base: Optimizer
    horizon: int
    done: int = 0

    @property
    def _scheduled(self) -> dict[str, Knots]:
        values = self.base.hyperparameters
        return {key: value for key, value in values.items() if isinstance(value, Knots)}

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """Those of the rule, with ``key[i]`` for knot i of a scheduled one."""
        found = dict(self.base.hyperparameters)
        for key, knots in self._scheduled.items():
            del found[key]
            found |= {f"{key}[{i}]": value for i, value in enumerate(knots.values)}
        return found

    def init(self, flat: Tensor) -> State:
        """The state of the rule, and the number of steps done."""
        return {**self.base.init(flat), "annealed": self.done}

    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """See `Optimizer.update`."""
        progress = min(1.0, state["annealed"] / self.horizon)
        now = dict(values)
        for key, knots in self._scheduled.items():
            given = [now.pop(f"{key}[{i}]") for i in range(len(knots.values))]
            now[key] = knots.at(given, progress)
        before = {k: v for k, v in state.items() if k != "annealed"}
        flat, after = self.base.update(flat, grad, before, now)
        return flat, {**after, "annealed": state["annealed"] + 1}
