"""Draws a result: PNG with Matplotlib, one self-contained HTML page with Plotly."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.checkpoint import check_writable
from bilevel.curves import COLORS, Curve, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from plotly.graph_objects import Figure

__all__ = ["COLORS", "html_figure", "write_figure"]

COLUMNS = 3
BEST = "best"
"""Legend of the line where a run was best."""

_LEGEND_ROOM = 8  # more entries stand beside the axes, not in them


def write_figure(panels: Sequence[Panel], path: str | os.PathLike[str], title: str) -> Path:
    """Write the panels as ``.png``, or as ``.html`` that needs no network.

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


def _places(panels: Sequence[Panel]) -> list[tuple[int, int, int]]:
    """Return row, column and width of each panel, in reading order."""
    places, row, column = [], 0, 0
    for panel in panels:
        if column + panel.span > COLUMNS:
            row, column = row + 1, 0
        places.append((row, column, panel.span))
        column += panel.span
    return places


def _write_png(panels: Sequence[Panel], path: Path, title: str) -> None:
    # The object-oriented interface: pyplot would keep the figure in a global registry.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as PngFigure

    places = _places(panels)
    rows = places[-1][0] + 1
    figure = PngFigure(figsize=(4.2 * COLUMNS, 2.7 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    grid = figure.add_gridspec(rows, COLUMNS)
    for panel, (row, column, span) in zip(panels, places, strict=True):
        _draw(figure.add_subplot(grid[row, column : column + span]), panel)
    figure.savefig(path, dpi=110)


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    for curve in panel.curves:
        for i, (name, low, high) in enumerate(curve.bands):
            axes.fill_between(
                curve.x,
                low,
                high,
                color=curve.color,
                alpha=_shade(i),
                lw=0,
                step="post" if panel.step else None,
                label=name,
            )
        axes.plot(
            curve.x,
            curve.y,
            color=curve.color,
            label=curve.label,
            lw=1.2,
            drawstyle="steps-post" if panel.step else "default",
            marker="o" if curve.marks else "",
            markersize=2.5,
        )
    if panel.best is not None:
        axes.axvline(panel.best, color=COLORS[9], lw=1, ls="--", label=BEST)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("training steps", fontsize=8)
    axes.tick_params(labelsize=8, which="both")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.log:
        axes.set_yscale("log")
    if panel.span > 1 or len(panel.curves) > _LEGEND_ROOM:
        axes.legend(
            fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0
        )
    elif _needs_legend(panel):
        axes.legend(fontsize=7, framealpha=0.7)


def html_figure(panels: Sequence[Panel], title: str) -> Figure:
    """Return the panels as one Plotly figure."""
    from plotly.subplots import make_subplots

    places = _places(panels)
    rows = places[-1][0] + 1
    specs: list[list[Any]] = [[None] * COLUMNS for _ in range(rows)]
    for row, column, span in places:
        specs[row][column] = {"colspan": span}
    figure = make_subplots(
        rows,
        COLUMNS,
        specs=specs,
        subplot_titles=[p.title for p in panels],
        vertical_spacing=0.3 / rows,
        horizontal_spacing=0.06,
    )
    figure.update_annotations(font_size=13)
    for panel, (row, column, _) in zip(panels, places, strict=True):
        where = {"row": row + 1, "col": column + 1}
        for curve in panel.curves:
            for trace in _traces(panel, curve):
                figure.add_trace(trace, **where)
        if panel.best is not None:
            line = {"color": COLORS[9], "width": 1, "dash": "dash"}
            shown = {"name": BEST, "showlegend": _needs_legend(panel), "legendgroup": panel.title}
            figure.add_vline(panel.best, line=line, **shown, **where)
        figure.update_xaxes(title_text="training steps", title_font_size=11, **where)
        if panel.log:
            figure.update_yaxes(type="log", exponentformat="power", **where)
    figure.update_layout(
        title=title,
        template="plotly_white",
        height=270 * rows + (90 if title else 20),
        margin={"t": 100 if title else 30, "b": 40},
        legend={"groupclick": "toggleitem", "traceorder": "grouped", "font": {"size": 11}},
        font={"size": 11},
        hovermode="closest",
    )
    return figure


def _traces(panel: Panel, curve: Curve) -> Iterator[Any]:
    """Yield the Plotly traces of a curve: the edges of its bands, then the line."""
    from plotly.graph_objects import Scatter

    shape = "hv" if panel.step else "linear"
    group = {"legendgroup": panel.title, "legendgrouptitle": {"text": panel.title}}
    for i, (name, low, high) in enumerate(curve.bands):
        for edge, fill in ((low, None), (high, "tonexty")):
            yield Scatter(
                x=curve.x,
                y=edge,
                name=name,
                mode="lines",
                line={"width": 0, "shape": shape},
                fill=fill,
                fillcolor=_faint(curve.color, _shade(i)),
                hoverinfo="skip",
                showlegend=fill is not None,
                **group,
            )
    yield Scatter(
        x=curve.x,
        y=curve.y,
        name=curve.label,
        mode="lines+markers" if curve.marks else "lines",
        marker={"size": 4},
        line={"color": curve.color, "width": 1.5, "shape": shape},
        showlegend=_needs_legend(panel),
        **group,
    )


def _write_html(panels: Sequence[Panel], path: Path, title: str) -> None:
    html_figure(panels, title).write_html(path, include_plotlyjs=True)


def _needs_legend(panel: Panel) -> bool:
    return len(panel.curves) > 1 or bool(panel.curves and panel.curves[0].bands)


def _shade(band: int) -> float:
    """Return the opacity of a band, from the outermost."""
    return 0.15 + 0.2 * band


def _faint(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:.2f})"
