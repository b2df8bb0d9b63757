"""The figure of a comparison, for its page and as PNG: every seed of every way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.curves import COLORS
from studies.compare import Comparison

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["comparison_figure", "comparison_png"]


def comparison_figure(found: Comparison) -> Figure:
    """Return validation and test loss of every seed, a row for each way, as a Plotly figure."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for metric, symbol, color in (("val/loss", "circle-open", 0), ("test/loss", "circle", 1)):
        points = [(r.metrics[metric], row.way.title) for row in found.rows for r in row.best]
        figure.add_trace(
            Scatter(
                x=[x for x, _ in points],
                y=[y for _, y in points],
                mode="markers",
                name=metric.replace("/", " "),
                marker={"symbol": symbol, "color": COLORS[color], "size": 10},
            )
        )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text="cross entropy (lower is better)")
    figure.update_layout(
        template="plotly_white",
        height=90 + 46 * len(found.rows),
        margin={"t": 20, "b": 50},
    )
    return figure


def comparison_png(found: Comparison, path: Path) -> Path:
    """Write the same as PNG, with means over seeds; return the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as PngFigure

    figure = PngFigure(figsize=(9, 0.55 * len(found.rows) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, row in enumerate(found.rows):
        for metric, color, shift, face in (
            ("val/loss", COLORS[0], -0.12, "none"),
            ("test/loss", COLORS[1], 0.12, COLORS[1]),
        ):
            values = [record.metrics[metric] for record in row.best]
            label = metric.replace("/", " ") if i == 0 else None
            height = [i + shift] * len(values)
            axes.scatter(values, height, edgecolors=color, facecolors=face, label=label, zorder=3)
            axes.plot([row.mean(metric)], [i + shift], "|", color=color, markersize=16)
    axes.set_yticks(range(len(found.rows)), [row.way.title for row in found.rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("cross entropy (lower is better); bars mark means over seeds")
    axes.set_title(
        f"{found.learner} on {found.task}: {found.budget} equivalent steps each, "
        f"seeds {', '.join(map(str, found.seeds))}",
        fontsize=10,
    )
    axes.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=120)
    return path
