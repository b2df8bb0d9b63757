"""Draws a result: PNG with Matplotlib, one self-contained HTML page with Plotly."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.checkpoint import check_writable
from bilevel.curves import Panel

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["html_figure", "write_figure"]

COLUMNS = 3
COLORS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8e5ea2", "#e08e0b", "#4a4e69", "#00798c", "#9c6644")


def write_figure(panels: Sequence[Panel], path: str | os.PathLike[str], title: str) -> Path:
    """Write the panels as ``.png`` or ``.html``.

    Raises:
        ValueError: another file ending.
        OSError: the file cannot be written.
    """
    path = Path(path)
    writers = {".png": _write_png, ".html": _write_html}
    if path.suffix not in writers:
        raise ValueError(f"path must end in one of {list(writers)}, but got {str(path)!r}.")
    check_writable(path, "path")
    writers[path.suffix](panels, path, title)
    return path


def _write_png(panels: Sequence[Panel], path: Path, title: str) -> None:
    # The object-oriented interface: pyplot would keep the figure in a global registry.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as PngFigure
    from matplotlib.ticker import MaxNLocator

    rows = math.ceil(len(panels) / COLUMNS)
    figure = PngFigure(figsize=(4.4 * COLUMNS, 2.9 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        for i, curve in enumerate(panel.curves):
            color = COLORS[i % len(COLORS)]
            if curve.band is not None:
                axes.fill_between(curve.x, *curve.band, color=color, alpha=0.25, lw=0)
            style = {"drawstyle": "steps-post"} if panel.step else {}
            axes.plot(curve.x, curve.y, color=color, label=curve.label, lw=1.4, **style)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel("training steps", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(alpha=0.25)
        if panel.log:
            axes.set_yscale("log")
        if len(panel.curves) > 1:
            axes.legend(fontsize=7, framealpha=0.7)
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=110)


def html_figure(panels: Sequence[Panel], title: str) -> Figure:
    """Return the panels as one Plotly figure."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    rows = math.ceil(len(panels) / COLUMNS)
    figure = make_subplots(
        rows, COLUMNS, subplot_titles=[p.title for p in panels], vertical_spacing=0.36 / (rows + 1)
    )
    for index, panel in enumerate(panels):
        where: dict[str, Any] = {"row": index // COLUMNS + 1, "col": index % COLUMNS + 1}
        for i, curve in enumerate(panel.curves):
            color = COLORS[i % len(COLORS)]
            line = {"color": color, "shape": "hv" if panel.step else "linear"}
            if curve.band is not None:
                edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
                for values, fill in zip(curve.band, (None, "tonexty"), strict=True):
                    band = Scatter(x=curve.x, y=values, fill=fill, **edge, showlegend=False)
                    band.fillcolor = _faint(color)
                    figure.add_trace(band, **where)
            line_trace = Scatter(x=curve.x, y=curve.y, name=curve.label, line=line, mode="lines")
            line_trace.showlegend = False
            figure.add_trace(line_trace, **where)
        figure.update_xaxes(title_text="training steps", **where)
        if panel.log:
            figure.update_yaxes(type="log", exponentformat="power", **where)
    figure.update_layout(title=title, template="plotly_white", height=300 * rows + 90)
    return figure


def _write_html(panels: Sequence[Panel], path: Path, title: str) -> None:
    html_figure(panels, title).write_html(path, include_plotlyjs=True)


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.22)"
