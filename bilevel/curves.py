"""What a result's figures show, independent of the library that draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bilevel.domains import Grad
from bilevel.run import Record
from bilevel.schedule import Schedule
from bilevel.space import Space

__all__ = ["Curve", "Panel", "panels"]

Array = NDArray[np.float64]

MAX_LINES = 6
"""Most elements of a tensor that are drawn one by one; more are drawn as quantiles."""


@dataclass(frozen=True)
class Curve:
    """One line, with an optional band around it.

    Attributes:
        label: name in the legend.
        x: inner steps.
        y: values.
        band: lower and upper edge.
    """

    label: str
    x: Array
    y: Array
    band: tuple[Array, Array] | None = None


@dataclass(frozen=True)
class Panel:
    """Curves over training steps that share a vertical axis.

    Attributes:
        title: what is shown.
        curves: the lines.
        log: whether the vertical axis is logarithmic.
        step: whether values hold until the next one, as a schedule does.
    """

    title: str
    curves: Sequence[Curve] = field(default_factory=tuple)
    log: bool = False
    step: bool = False


def panels(trace: Sequence[Record], schedule: Schedule, space: Space) -> list[Panel]:
    """Return the panels of a run: losses, hypergradient norms, and each hyperparameter."""
    losses = [
        _column(trace, key, label)
        for key, label in (
            ("outer_loss", "outer loss"),
            ("val_loss", "validation loss"),
            ("inner_loss", "inner loss"),
        )
    ]
    norms = [_column(trace, f"grad_norm/{n}", n) for n in schedule.names]
    norms = [_column(trace, "grad_norm", "all"), *norms] if len(norms) > 1 else norms
    return [
        Panel("loss", [c for c in losses if len(c.x)]),
        Panel("hypergradient norm |dF/dz|", [_positive(c) for c in norms], log=True),
        *(_hyperparameter(name, schedule, space) for name in schedule.names),
    ]


def _column(trace: Sequence[Record], key: str, label: str) -> Curve:
    found = [(r["steps"], r[key]) for r in trace if r.get(key) is not None]
    table = np.asarray(found, dtype=np.float64).reshape(-1, 2)
    return Curve(label, table[:, 0], table[:, 1])


def _positive(curve: Curve) -> Curve:
    keep = curve.y > 0
    return Curve(curve.label, curve.x[keep], curve.y[keep])


def _hyperparameter(name: str, schedule: Schedule, space: Space) -> Panel:
    domain = space[name]
    log = isinstance(domain, Grad) and domain.scale == "log"
    x = schedule["step"]
    table = schedule[name].reshape(len(x), -1) if name in schedule else None
    if table is not None and table.shape[1] <= MAX_LINES:
        labels = [name] if table.shape[1] == 1 else [f"[{i}]" for i in range(table.shape[1])]
        curves = [Curve(label, x, table[:, i]) for i, label in enumerate(labels)]
        return Panel(name, curves, log, step=True)
    low, q25, median, q75, high, _ = schedule.summary(name).T
    size = int(np.prod(domain.value_shape)) if isinstance(domain, Grad) else 0
    return Panel(
        f"{name} ({size} values)",
        [
            Curve("min to max", x, median, (low, high)),
            Curve("median and quartiles", x, median, (q25, q75)),
        ],
        log,
        step=True,
    )
