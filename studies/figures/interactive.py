"""Charts as Plotly figures, for a page and for the dashboard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from studies.figures.charts import DARK, ON_COLORS, Bars, Chart, Curves, HeatMap, Line

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["interactive"]

DECADES = 300.0
"""Ratio of the largest to the least value above which only powers of ten are labeled."""

DIGITS = 5.0
"""The same ratio above which only 1, 2 and 5 times a power of ten are."""

_INSTANT = {"line_color": DARK, "line_width": 1, "line_dash": "dash"}

_SYMBOLS = {"dot": "circle", "ring": "circle-open", "cross": "x-thin"}


def interactive(chart: Chart) -> Figure:
    """Return a chart as a Plotly figure, as high as it needs."""
    if isinstance(chart, Curves):
        figure, height = _curves(chart)
    elif isinstance(chart, Bars):
        figure, height = _bars(chart)
    else:
        figure, height = _heat_map(chart)
    return figure.update_layout(
        title=chart.title,
        template="plotly_white",
        height=height,
        margin={"t": 70, "b": 50, "l": 60, "r": 20},
        font={"size": 12},
    )


def _curves(chart: Curves) -> tuple[Figure, int]:
    from plotly.subplots import make_subplots

    figure = make_subplots(
        chart.rows,
        chart.columns,
        subplot_titles=[plane.title for plane in chart.planes],
        vertical_spacing=0.25 / chart.rows,
        horizontal_spacing=0.09,
    )
    named: set[str] = set()
    for place, plane in enumerate(chart.planes):
        where = {"row": place // chart.columns + 1, "col": place % chart.columns + 1}
        for line in plane.lines:
            figure.add_trace(_trace(line, line.label not in named), **where)
            named.add(line.label)
        if plane.instant is not None:
            label = plane.instant.label
            look = {"name": label, "legendgroup": label, "showlegend": label not in named}
            figure.add_vline(plane.instant.x, **_INSTANT, **look, **where)
            named.add(label)
        figure.update_yaxes(title_text=plane.y_label, **where)
        if plane.log:
            figure.update_yaxes(type="log", exponentformat="power", **where)
            values = [value for line in plane.lines for value in line.y]
            # Else labels between the powers of ten overlap where the plane is low.
            for ratio, ticks in ((DECADES, 1), (DIGITS, "D2")):
                if max(values) > ratio * min(values):
                    figure.update_yaxes(dtick=ticks, **where)
                    break
        if place + chart.columns >= len(chart.planes):  # the lowest of its column
            figure.update_xaxes(title_text=plane.x_label, **where)
    if len(chart.planes) > 1:
        figure.update_annotations(font_size=11)
        figure.update_xaxes(tickfont_size=9, title_font_size=11)
        figure.update_yaxes(tickfont_size=9, title_font_size=11)
    figure.update_layout(
        showlegend=len(named) > 1, legend={"tracegroupgap": 0, "font": {"size": 11}}
    )
    return figure, 420 if chart.rows == 1 else 230 * chart.rows + 90


def _trace(line: Line, named: bool) -> Any:
    from plotly.graph_objects import Scatter

    modes = [mode for mode, on in (("lines", line.width > 0), ("markers", line.mark)) if on]
    return Scatter(
        x=list(line.x),
        y=list(line.y),
        mode="+".join(modes),
        name=line.label,
        legendgroup=line.label,
        showlegend=named,
        line={
            "color": line.color,
            "width": line.width,
            "dash": "dot" if line.dashed else "solid",
            "shape": "hv" if line.step else "linear",
        },
        marker={
            "color": line.color,
            "size": 9,
            "symbol": _SYMBOLS.get(line.mark),
            "line": {"width": 1.5, "color": line.color},
        },
        text=list(line.texts) or None,
        hovertemplate="%{text}<br>%{x}: %{y:.4g}<extra></extra>" if line.texts else None,
    )


def _bars(chart: Bars) -> tuple[Figure, int]:
    from plotly.graph_objects import Bar, Figure

    figure = Figure()
    for group, color in dict.fromkeys((bar.group, bar.color) for bar in chart.bars):
        mine = [bar for bar in chart.bars if bar.group == group]
        figure.add_trace(
            Bar(
                x=[bar.length for bar in mine],
                y=[bar.name for bar in mine],
                orientation="h",
                name=group,
                marker={"color": color},
            )
        )
    names = [bar.name for bar in reversed(chart.bars)]
    figure.update_yaxes(categoryorder="array", categoryarray=names, automargin=True)
    figure.update_xaxes(title_text=chart.x_label, rangemode="tozero")
    figure.update_layout(showlegend=True)
    return figure, 140 + 24 * len(chart.bars)


def _heat_map(chart: HeatMap) -> tuple[Figure, int]:
    from plotly.graph_objects import Figure, Heatmap

    figure = Figure(
        Heatmap(
            x=chart.edges,
            y=list(chart.rows),
            z=[list(row) for row in chart.shares],
            zmin=0,
            zmax=1,
            text=[list(row) for row in chart.texts],
            colorscale="Viridis",
            colorbar={
                "title": {"text": "own range", "side": "right"},
                "tickvals": [0, 1],
                "ticktext": ["lowest", "highest"],
            },
            hovertemplate="step %{x}<br>%{y}<br>value %{text}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title_text=chart.x_label)
    if chart.instant is not None:
        text = {"annotation_text": chart.instant.label, "annotation_position": "top"}
        figure.add_vline(
            chart.instant.x, **_INSTANT | {"line_color": ON_COLORS, "line_width": 1.5}, **text
        )
    return figure, 120 + 22 * len(chart.rows)
