"""What a result's figures show, independent of the library that draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bilevel.domains import Grad
from bilevel.run import Record
from bilevel.schedule import Schedule
from bilevel.space import Space

__all__ = ["COLORS", "Curve", "Panel", "panels"]

Array = NDArray[np.float64]

COLORS = (
    "#1f6fb4", "#d1495b", "#2e8b57", "#8e5ea2", "#e08e0b",
    "#00a3a1", "#9c6644", "#d66ba0", "#7a8b0f", "#4a4e69",
)  # fmt: skip

MAX_LINES = 6
"""Most elements of a tensor that are drawn one by one; more are drawn as quantiles."""


@dataclass(frozen=True)
class Curve:
    """One line, with optional bands around it.

    Attributes:
        label: name in the legend.
        x: inner steps.
        y: values.
        color: as ``#rrggbb``.
        bands: name, lower edge and upper edge of each, from the outermost.
        marks: whether the points are marked.
    """

    label: str
    x: Array
    y: Array
    color: str = COLORS[0]
    bands: Sequence[tuple[str, Array, Array]] = ()
    marks: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over training steps that share a vertical axis.

    Attributes:
        title: what is shown.
        curves: the lines.
        log: whether the vertical axis is logarithmic.
        step: whether values hold until the next one, as a schedule does.
        span: columns that it takes.
        best: training steps at which the run was best; None where that is not marked.
    """

    title: str
    curves: Sequence[Curve]
    log: bool = False
    step: bool = False
    span: int = 1
    best: float | None = None


def panels(
    trace: Sequence[Record],
    schedule: Schedule,
    space: Space,
    steps: int,
    best: float | None = None,
) -> list[Panel]:
    """Return the panels of a run: losses, hypergradient norms, and each hyperparameter.

    A hyperparameter has the same color in all of them.

    Args:
        trace: of the run.
        schedule: of the run; the values that would have come next are not drawn.
        space: the hyperparameters.
        steps: training steps of the run.
        best: training steps at which it was best, to be marked where that was before the end.
    """
    mark = best if best is not None and best < steps else None
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(schedule.names)}
    losses = [
        _column(trace, "outer_loss", "outer loss (batch)", COLORS[0]),
        _column(trace, "inner_loss", "inner loss (batch)", COLORS[9]),
        _column(trace, "val_loss", "validation loss", COLORS[1], marks=True),
    ]
    losses = [curve for curve in losses if len(curve.x)]
    norms = [_column(trace, f"grad_norm/{n}", n, colors[n]) for n in schedule.names]
    if len(norms) > 1:
        norms = [_column(trace, "grad_norm", "all", "#000000"), *norms]
    return [
        Panel(
            losses[0].label if len(losses) == 1 else "loss",
            losses,
            log=_spans_decades([c.y for c in losses]),
            best=mark,
        ),
        Panel("hypergradient norm ‖dF/dz‖", [_positive(c) for c in norms], True, span=2, best=mark),
        *(
            replace(_hyperparameter(name, schedule, space, colors[name], steps), best=mark)
            for name in schedule.names
        ),
    ]


def _column(
    trace: Sequence[Record], key: str, label: str, color: str, marks: bool = False
) -> Curve:
    found = [(r["steps"], r[key]) for r in trace if r.get(key) is not None]
    table = np.asarray(found, dtype=np.float64).reshape(-1, 2)
    return Curve(label, table[:, 0], table[:, 1], color, marks=marks)


def _positive(curve: Curve) -> Curve:
    """Return the curve with gaps where a logarithmic axis has no place for it."""
    return Curve(curve.label, curve.x, np.where(curve.y > 0, curve.y, np.nan), curve.color)


def _spans_decades(values: Sequence[Array]) -> bool:
    every = np.concatenate([np.ones(0), *values])
    return bool(len(every) and every.min() > 0 and every.max() > 100 * every.min())


def _hyperparameter(name: str, schedule: Schedule, space: Space, color: str, steps: int) -> Panel:
    domain = space[name]
    log = isinstance(domain, Grad) and domain.scale == "log"
    rows = schedule.rows(steps)
    x = np.append(schedule["step"][:rows], steps)
    held = [*range(rows), rows - 1]  # the last values hold until the end
    table = schedule[name][held].reshape(len(x), -1) if name in schedule else None
    if table is not None and table.shape[1] == 1:
        return Panel(name, [Curve(name, x, table[:, 0], color)], log, step=True)
    if table is not None and table.shape[1] <= MAX_LINES:
        first = COLORS.index(color)
        shades = [COLORS[(first + i) % len(COLORS)] for i in range(table.shape[1])]
        lines = [Curve(f"{name}[{i}]", x, table[:, i], c) for i, c in enumerate(shades)]
        return Panel(name, lines, log, step=True)
    low, q25, median, q75, high, _ = schedule.summary(name)[held].T
    bands = (("range", low, high), ("quartiles", q25, q75))
    title = f"{name} ({schedule.size(name)} values)"
    return Panel(title, [Curve("median", x, median, color, bands)], log, step=True)
