"""Update rules made from update rules: edited gradients and scheduled hyperparameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.coordinates import interpolate
from bilevel.domains import Grad
from hypergrad.optimizers import Hyper, Optimizer, State, Value, Values

__all__ = ["Annealed", "EditedGradient"]


@dataclass(frozen=True)
class EditedGradient(Optimizer):
    """w, s ← U(w, e(∇f(w), w), s): an update rule on an edited gradient.

    The edit is differentiated with the rule, so hypergradients through training are exact.

    Attributes:
        base: the rule U.
        edit: e, ``(grad, flat) -> grad`` on flat vectors; pure and differentiable.
    """

    base: Optimizer
    edit: Callable[[Tensor, Tensor], Tensor]

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """Those of the rule."""
        return self.base.hyperparameters

    def init(self, flat: Tensor) -> State:
        """See `Optimizer.init`."""
        return self.base.init(flat)

    def update(
        self, flat: Tensor, grad: Tensor, state: State, values: Values
    ) -> tuple[Tensor, State]:
        """See `Optimizer.update`."""
        return self.base.update(flat, self.edit(grad, flat), state, values)


@dataclass(frozen=True)
class Annealed(Optimizer):
    """An update rule whose tuned hyperparameters follow schedules over training.

    Step t uses ``interpolate(domain, knots, t / horizon)`` for every hyperparameter that is a
    `Hyper` of a scheduled name; hypergradients reach every knot.  The optimizer state counts
    the steps.

    Attributes:
        base: the rule.
        schedules: name of a hyperparameter -> its domain, a `Grad` with a schedule.
        horizon: steps that the knots span; the last knot stays in force afterwards.
        done: steps done before the first one of this rule.
    """

    base: Optimizer
    schedules: Mapping[str, Grad]
    horizon: int
    done: int = 0

    @property
    def _scheduled(self) -> dict[str, tuple[Hyper, Grad, list[str]]]:
        """Key -> what it stands for, its schedule, and the keys of its knots."""
        return {
            key: (value, self.schedules[value.name], [f"{key}[{i}]" for i in range(k)])
            for key, value in self.base.hyperparameters.items()
            if isinstance(value, Hyper)
            and value.name in self.schedules
            and (k := self.schedules[value.name].schedule)
        }

    @property
    def hyperparameters(self) -> dict[str, Value]:
        """Those of the rule, with ``key[i]`` for knot i of a scheduled one."""
        found = dict(self.base.hyperparameters)
        for key, (hyper, _, knots) in self._scheduled.items():
            del found[key]
            found |= {knot: Hyper(hyper.name, _Select(i)) for i, knot in enumerate(knots)}
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
        for key, (hyper, domain, names) in self._scheduled.items():
            given = [now.pop(name) for name in names]
            like = next((k for k in given if isinstance(k, Tensor)), torch.tensor(0.0).double())
            knots = torch.stack([torch.as_tensor(k).to(like) for k in given])
            # By now a knot is one number, or spread over the flat vector.
            spread = dataclasses.replace(domain, init=_inside(domain), shape=like.shape)
            value = interpolate(spread, knots, progress)
            value = value if hyper.transform is None else hyper.transform(value)
            numbers = all(isinstance(k, float) for k in given)
            now[key] = value.item() if numbers else value
        before = {k: v for k, v in state.items() if k != "annealed"}
        flat, after = self.base.update(flat, grad, before, now)
        return flat, {**after, "annealed": state["annealed"] + 1}


@dataclass(frozen=True)
class _Select:
    """Selects a knot; a frozen object, so that equal rules compare equal."""

    index: int

    def __call__(self, knots: Tensor) -> Tensor:
        return knots[self.index]


def _inside(domain: Grad) -> float:
    """Return a number that the domain allows, whatever the shape of its init."""
    return float(torch.tensor(domain.init, dtype=torch.float64).flatten()[0])
