"""Reports: one self-contained HTML page and a PNG, of a study or of a comparison."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.curves import Panel, panels
from bilevel.plots import COLORS, html_figure, write_figure
from studies.compare import METRICS, Comparison
from studies.messages import TRACE
from studies.plots import figures
from studies.storage import check_folder
from studies.tables import number, value_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from studies.readable import Readable

__all__ = ["comparison_report", "run_panels", "study_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px; padding: 0 1rem;
       color: #1c1f26; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e3e6ec; }
th:first-child, td:first-child, .text { text-align: left; }
td.text { font-size: .85rem; max-width: 46rem; overflow-wrap: anywhere; }
table.small { font-size: .85rem; } td.kept { color: #9aa0ab; }
tr.best td { font-weight: 600; background: #f2f7fd; } p.note { color: #555b66; }
"""


def study_report(study: Readable, folder: Path) -> Path:
    """Write ``report.html`` and, where the gradient owned something, ``report.png``.

    Raises:
        ValueError: no trial is complete.
        StorageError: the folder cannot be written to.
    """
    check_folder(folder, "the report's folder")
    best = study.best
    rows = [
        [
            str(record.number),
            record.state,
            number(record.metrics.get("val/loss")),
            number(record.metrics.get("test/loss")),
            str(record.cost.equivalent_steps),
            str(record.failure) if record.failure else _values(record.hparams),
        ]
        for record in study.trials
    ]
    headings = ["trial", "state", "val loss", "test loss", "cost", "hyperparameters at the end"]
    marked = [record.number == best.number for record in study.trials]
    parts = [
        _note(
            f"{len(rows)} trials{_of(study)}. "
            "Cost is in equivalent training steps: gradients + 2 · Hessian-vector products. "
            "Trials are chosen by validation loss; the test split is only reported."
        ),
        _table(headings, rows, marked),
    ]
    first = True
    for figure in figures(study).values():
        parts.append(_plot(figure, first=first))
        first = False
    drawn = run_panels(study)
    if drawn:
        title = f"trial {best.number}: losses, hypergradients and schedules"
        parts += [f"<h2>{title}</h2>", _plot(html_figure(drawn, ""), first=first)]
        write_figure(drawn, folder / "report.png", f"{study.name}, {title}")
    return _write(folder / "report.html", study.name, parts)


def comparison_report(found: Comparison, folder: Path) -> tuple[Path, list[Path]]:
    """Write the page and the figures of a comparison.

    Returns:
        The page, and the PNG files.

    Raises:
        StorageError: the folder cannot be written to.
    """
    check_folder(folder, "the report's folder")
    pictures = [_comparison_png(found, folder / f"{found.task}-comparison.png")]
    headings = ["", *(m.replace("/", " ") for m in METRICS), "cost", "seconds"]
    best = min(found.rows, key=lambda row: row.mean("val/loss"))
    rows = [
        [
            row.way.title,
            *(row.text(m) for m in METRICS),
            f"{sum(row.costs) / len(row.costs):.0f}",
            f"{sum(row.seconds) / len(row.seconds):.1f}",
        ]
        for row in found.rows
    ]
    options = ", ".join(f"{k}={v}" for k, v in found.options.items())
    parts = [
        _note(
            f"{found.learner} on {found.task} ({options}); seeds "
            f"{', '.join(map(str, found.seeds))}. Budget of every way and seed: {found.budget} "
            f"equivalent training steps. {found.explain()} "
            "The row in bold has the lowest mean validation loss."
        ),
        _table(headings, rows, [row is best for row in found.rows]),
        "<h2>Every seed</h2>",
        _plot(_comparison_figure(found), first=True),
    ]
    study = found.studies["gradient"]
    drawn = run_panels(study)
    if drawn:
        title = f"gradient-tuned run at seed {found.seeds[0]}"
        parts += [
            f"<h2>{html.escape(title)}: losses, hypergradients and schedules</h2>",
            _plot(html_figure(drawn, ""), first=False),
        ]
        pictures.append(write_figure(drawn, folder / f"{found.task}-schedule.png", title))
    parts += [
        f"<h2>Hyperparameters at the end of the best trial, seed {found.seeds[0]}</h2>",
        _hyperparameters(found),
    ]
    page = _write(folder / f"{found.task}.html", f"Tuning {found.task}", parts)
    return page, pictures


def run_panels(study: Readable) -> list[Panel]:
    """Return the panels of the best trial's run; none where the gradient owned nothing."""
    schedule, trace = study.schedule(), study.artifact(TRACE)
    if schedule is None or trace is None:
        return []
    return panels(json.loads(trace), schedule, study.space)


def _comparison_figure(found: Comparison) -> Figure:
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


def _comparison_png(found: Comparison, path: Path) -> Path:
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


def _hyperparameters(found: Comparison) -> str:
    """A table of what each way chose; a value that a way took as it was is gray."""
    columns = [(row.way, row.best[0].hparams) for row in found.rows]
    names = dict.fromkeys(name for _, values in columns for name in values)
    head = "".join(f"<th>{html.escape(way.title)}</th>" for way, _ in columns)
    body = []
    for name in names:
        cells = [f"<td>{html.escape(name)}</td>"]
        for way, values in columns:
            kept = " class=kept" if way.space.owner(name) == "fixed" else ""
            text = value_text(values[name]) if name in values else "-"
            cells.append(f"<td{kept}>{html.escape(text)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table class=small><thead><tr><th></th>{head}</tr></thead>"
    return f"{table}<tbody>{''.join(body)}</tbody></table>"


def _of(study: Readable) -> str:
    """What the trials are of; nothing for a study that another program made."""
    settings = study.optuna.user_attrs.get("settings")
    if settings is None:
        return ""
    return f" of {settings['learner']} on {settings['task']['name']}, seed {settings['seed']}"


def _values(hparams: object) -> str:
    items = hparams.items() if isinstance(hparams, dict) else ()
    return "  ".join(f"{name}={value_text(value)}" for name, value in items)


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool]) -> str:
    wordy = [any("=" in row[i] for row in rows) for i in range(len(headings))]
    kinds = [" class=text" if words else "" for words in wordy]

    def line(tag: str, cells: Sequence[str]) -> str:
        pairs = zip(kinds, cells, strict=True)
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in pairs)

    body = [
        f"<tr{' class=best' if mark else ''}>{line('td', row)}</tr>"
        for row, mark in zip(rows, marked, strict=True)
    ]
    head = line("th", headings)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _plot(figure: Figure, *, first: bool) -> str:
    """A figure as HTML; the first of a page brings the drawing code along."""
    return str(figure.to_html(full_html=False, include_plotlyjs=first))


def _write(path: Path, title: str, parts: Sequence[str]) -> Path:
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    body = f"<h1>{html.escape(title)}</h1>" + "\n".join(parts)
    page = f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>"
    path.write_text(page, encoding="utf-8")
    return path
