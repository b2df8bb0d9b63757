"""What a study's figures show, independent of the library that draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bilevel.curves import COLORS

__all__ = [
    "DARK",
    "ON_COLORS",
    "Bar",
    "Bars",
    "Chart",
    "Curves",
    "HeatMap",
    "Instant",
    "Line",
    "Plane",
    "short",
    "thin",
]

MOST_POINTS = 200
"""Points of a drawn curve."""

LONGEST_NAME = 28
"""Characters of a name that a panel or a bar has room for."""

DARK = COLORS[9]
"""Color of what is best: the best so far, a front, the mark of the best rung."""

ON_COLORS = "#ffffff"
"""Color of a line across a heat map."""

Mark = Literal["", "dot", "ring", "cross"]


@dataclass(frozen=True)
class Line:
    """Points, joined or marked.

    Attributes:
        label: name in the legend; lines of a label share their entry.
        x: places.
        y: values.
        color: as ``#rrggbb``.
        width: of the line in points; 0 for marks alone.
        dashed: whether the line is.
        step: whether a value holds until the next one.
        mark: at each point; "" for none.
        texts: about each point, for a pointer over it; empty for none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    width: float = 1.5
    dashed: bool = False
    step: bool = False
    mark: Mark = ""
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Instant:
    """A place on the horizontal axis, marked by a thin vertical line.

    Attributes:
        x: the place.
        label: what was there: in the legend, or above the line.
    """

    x: float
    label: str


@dataclass(frozen=True)
class Plane:
    """Lines over the same two axes.

    Attributes:
        lines: what is drawn.
        x_label: with its unit.
        y_label: with its unit.
        title: above it; "" for none.
        log: whether the vertical axis is logarithmic.
        instant: a place that is marked; None for none.
    """

    lines: Sequence[Line]
    x_label: str
    y_label: str
    title: str = ""
    log: bool = False
    instant: Instant | None = None


@dataclass(frozen=True)
class Curves:
    """Planes side by side, with one legend.

    Attributes:
        title: of the figure.
        planes: in reading order.
    """

    title: str
    planes: Sequence[Plane]

    @property
    def columns(self) -> int:
        """Planes in a row."""
        return min(3, len(self.planes))

    @property
    def rows(self) -> int:
        """Rows of planes."""
        return math.ceil(len(self.planes) / self.columns)


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: beside it.
        length: its value.
        group: what it belongs to, in the legend.
        color: of the group.
    """

    name: str
    length: float
    group: str
    color: str


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from top to bottom.

    Attributes:
        title: of the figure.
        bars: the first is on top.
        x_label: with its unit.
    """

    title: str
    bars: Sequence[Bar]
    x_label: str


@dataclass(frozen=True)
class HeatMap:
    """Rows of colors, each scaled to its own range.

    Attributes:
        title: of the figure.
        x: where each column begins.
        end: where the last one ends.
        rows: labels, the first on top.
        shares: of each row and column, from 0 (its lowest value) to 1.
        texts: the values themselves.
        x_label: with its unit.
        instant: a place that is marked; None for none.
    """

    title: str
    x: Sequence[float]
    end: float
    rows: Sequence[str]
    shares: Sequence[Sequence[float]]
    texts: Sequence[Sequence[str]]
    x_label: str
    instant: Instant | None = None

    @property
    def edges(self) -> list[float]:
        """Where columns begin, and where the last one ends: a value holds until the next one."""
        return [*self.x, self.end]


Chart = Curves | Bars | HeatMap


def thin(count: int) -> list[int]:
    """Return places of at most so many of `count` points, the first and the last included."""
    step = max(1, math.ceil(count / MOST_POINTS))
    kept = list(range(0, count, step))
    return kept if not kept or kept[-1] == count - 1 else [*kept, count - 1]


def short(name: str) -> str:
    """A long name without its middle."""
    if len(name) <= LONGEST_NAME:
        return name
    half = (LONGEST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
