"""Reports: one self-contained HTML page and its figures as PNG, of a study or of a comparison."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from bilevel.curves import Panel, panels
from bilevel.plots import html_figure, write_figure
from studies.compare import METRICS, Comparison
from studies.figures.comparison import comparison_figure, comparison_png
from studies.figures.html import figure_part, note, table, write_page
from studies.figures.interactive import interactive
from studies.figures.pictures import write_picture
from studies.figures.plots import figures
from studies.messages import TRACE
from studies.record import TrialRecord
from studies.storage.database import check_folder
from studies.views.objectives import better, leading, objectives
from studies.views.readable import Readable
from studies.views.summary import describe_values
from studies.views.tables import trial_cells, trial_headings, value_text

__all__ = ["comparison_report", "run_panels", "study_report", "write_report"]


def study_report(study: Readable, folder: Path) -> Path:
    """Write the page of a study and its figures; return the page.  See `write_report`."""
    return write_report(study, folder)[0]


def write_report(study: Readable, folder: Path) -> list[Path]:
    """Write ``report.html``, one self-contained page, and a PNG for each of its figures.

    The PNGs have the names of `studies.figures.plots.FIGURES`, such as ``values.png``, and
    ``best_trial.png``; of those only what the study has something for.

    Returns:
        The page, then the PNGs in the order of the page.

    Raises:
        NoResultError: no trial is complete, or none within the constraints.
        StorageError: the folder cannot be written to.
    """
    check_folder(folder, "the report's folder")
    best = leading(study)
    if not best:
        raise study.no_result()
    parts = [note(_explanation(study)), _trials(study, best)]
    files: list[Path] = []
    for name, chart in figures(study).items():
        parts.append(figure_part(interactive(chart), first=not files))
        files.append(write_picture(chart, folder / f"{name}.png"))
    drawn = run_panels(study, best[0])
    if drawn:
        title = f"trial {best[0].number}: losses, hypergradients and schedules"
        parts += [f"<h2>{title}</h2>", figure_part(html_figure(drawn, ""), first=not files)]
        files.append(write_figure(drawn, folder / "best_trial.png", f"{study.name}, {title}"))
    return [write_page(folder / "report.html", study.name, parts), *files]


def _explanation(study: Readable) -> str:
    settings = study.optuna.user_attrs.get("settings")
    of = ""  # nothing for a study that another program made
    if settings is not None:
        of = f" of {settings['learner']} on {settings['task']['name']}, seed {settings['seed']}"
    names, words = objectives(study.optuna), better(study.optuna)
    by = " and ".join(f"{name} ({word})" for name, word in zip(names, words, strict=True))
    bold = "the front is" if len(names) > 1 else "the best one is"
    return (
        f"{len(study.trials)} trials{of}. "
        "Cost is in equivalent training steps: gradients + 2 · Hessian-vector products. "
        f"Trials are chosen by {by}; {bold} in bold. The test split is only reported."
    )


def _trials(study: Readable, best: Sequence[TrialRecord]) -> str:
    headings = [*trial_headings(study), "hyperparameters as they came out"]
    lead = {record.number for record in best}
    rows = []
    for record in study.trials:
        values = describe_values(record.hparams or record.params)
        ending = str(record.failure) if record.failure else values
        rows.append([*trial_cells(study, record, lead), ending])
    return table(headings, rows, [record.number in lead for record in study.trials])


def comparison_report(found: Comparison, folder: Path) -> tuple[Path, list[Path]]:
    """Write the page and the figures of a comparison.

    Returns:
        The page, and the PNG files.

    Raises:
        StorageError: the folder cannot be written to.
    """
    check_folder(folder, "the report's folder")
    pictures = [comparison_png(found, folder / f"{found.task}-comparison.png")]
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
        note(
            f"{found.learner} on {found.task} ({options}); seeds "
            f"{', '.join(map(str, found.seeds))}. Budget of every way and seed: {found.budget} "
            f"equivalent training steps. {found.explain()} "
            "The row in bold has the lowest mean validation loss."
        ),
        table(headings, rows, [row is best for row in found.rows]),
        "<h2>Every seed</h2>",
        figure_part(comparison_figure(found), first=True),
    ]
    study = found.studies["gradient"]
    drawn = run_panels(study, study.best)
    if drawn:
        title = f"gradient-tuned run at seed {found.seeds[0]}"
        parts += [
            f"<h2>{html.escape(title)}: losses, hypergradients and schedules</h2>",
            figure_part(html_figure(drawn, ""), first=False),
        ]
        pictures.append(write_figure(drawn, folder / f"{found.task}-schedule.png", title))
    parts += [
        f"<h2>Hyperparameters of the best trial as they came out, seed {found.seeds[0]}</h2>",
        _hyperparameters(found),
    ]
    page = write_page(folder / f"{found.task}.html", f"Tuning {found.task}", parts)
    return page, pictures


def run_panels(study: Readable, record: TrialRecord) -> list[Panel]:
    """Return the panels of a trial's run; none where the gradient owned nothing."""
    schedule, trace = study.schedule(record.number), study.artifact(TRACE, record.number)
    if schedule is None or trace is None:
        return []
    return panels(json.loads(trace), schedule, study.space, record.cost.steps, record.at)


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
