"""Charts as PNG files, drawn by Matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from studies.figures.charts import DARK, ON_COLORS, Bars, Chart, Curves, HeatMap, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["write_picture"]

_MARKS = {"dot": "o", "ring": "o", "cross": "x", "": ""}


def write_picture(chart: Chart, path: Path) -> Path:
    """Write a chart as a PNG file.

    Raises:
        OSError: the file cannot be written.
    """
    # The object-oriented interface: pyplot would keep the figure in a global registry.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    if isinstance(chart, Curves):
        _curves(figure, chart)
    elif isinstance(chart, Bars):
        _bars(figure, chart)
    else:
        _heat_map(figure, chart)
    figure.suptitle(chart.title, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    return path


def _curves(figure: Figure, chart: Curves) -> None:
    figure.set_size_inches(
        10 if chart.columns == 1 else 4.2 * chart.columns + 1.6,
        4.6 if chart.rows == 1 else 2.5 * chart.rows + 0.6,
    )
    grid = figure.subplots(chart.rows, chart.columns, squeeze=False).flatten()
    entries: dict[str, Line2D] = {}
    for axes, plane in zip(grid, chart.planes, strict=False):
        for line in plane.lines:
            entries.setdefault(line.label, _line(axes, line))
        if plane.instant is not None:
            drawn = axes.axvline(plane.instant.x, color=DARK, linewidth=1, linestyle="--")
            entries.setdefault(plane.instant.label, drawn)
        axes.set_title(plane.title, fontsize=9, loc="left")
        axes.set_xlabel(plane.x_label, fontsize=8)
        axes.set_ylabel(plane.y_label, fontsize=8)
        axes.tick_params(labelsize=8, which="both")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if plane.log:
            axes.set_yscale("log")
    for axes in grid[len(chart.planes) :]:
        axes.set_visible(False)
    if len(entries) > 1:
        figure.legend(
            handles=list(entries.values()),
            labels=list(entries),
            fontsize=8,
            frameon=False,
            loc="outside right upper",
        )


def _line(axes: Axes, line: Line) -> Line2D:
    (drawn,) = axes.plot(
        line.x,
        line.y,
        color=line.color,
        linewidth=line.width,
        linestyle="none" if line.width == 0 else ":" if line.dashed else "-",
        drawstyle="steps-post" if line.step else "default",
        marker=_MARKS[line.mark],
        markersize=6,
        markerfacecolor="none" if line.mark == "ring" else line.color,
    )
    return drawn


def _bars(figure: Figure, chart: Bars) -> None:
    figure.set_size_inches(9, 1.5 + 0.28 * len(chart.bars))
    axes = figure.subplots()
    for group, color in dict.fromkeys((bar.group, bar.color) for bar in chart.bars):
        mine = [i for i, bar in enumerate(chart.bars) if bar.group == group]
        axes.barh(mine, [chart.bars[i].length for i in mine], color=color, label=group)
    axes.set_yticks(range(len(chart.bars)), [bar.name for bar in chart.bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(chart.x_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)


def _heat_map(figure: Figure, chart: HeatMap) -> None:
    figure.set_size_inches(9, 1.4 + 0.24 * len(chart.rows))
    axes = figure.subplots()
    rows = np.arange(len(chart.rows) + 1) - 0.5
    drawn = axes.pcolormesh(
        chart.edges, rows, np.asarray(chart.shares), vmin=0, vmax=1, cmap="viridis"
    )
    axes.set_yticks(range(len(chart.rows)), chart.rows, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(chart.x_label, fontsize=8)
    axes.tick_params(labelsize=8)
    if chart.instant is not None:
        axes.axvline(chart.instant.x, color=ON_COLORS, linewidth=1.2, linestyle="--")
        axes.annotate(
            chart.instant.label,
            (chart.instant.x, 1.0),
            (0, 2),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    bar = figure.colorbar(drawn, ax=axes, ticks=[0, 1], shrink=min(1.0, 4 / len(chart.rows)))
    bar.set_ticklabels(["lowest", "highest"], fontsize=8)
    bar.set_label("own range", fontsize=8)
