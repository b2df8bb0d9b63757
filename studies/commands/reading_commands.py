"""Commands of `bilevel study` that look at a study and change nothing of it."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer

from studies.commands.options import Format, Name, Names, Target, Targets, Values
from studies.commands.printing import Json, print_json, print_result
from studies.storage.collector import imports

__all__ = ["reading_app"]

reading_app = typer.Typer()


@reading_app.command()
def status(
    target: Target,
    name: Name = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it every two seconds until nobody runs it.")
    ] = False,
    json: Json = False,
) -> None:
    """Say who runs a study and how far it is."""
    with imports():
        from studies.commands.status import status_of, status_view, watch_status
        from studies.views.stored import StoredStudy

    study = StoredStudy(target, name)
    if watch and not json:
        watch_status(study)
    found = status_of(study)
    if json:
        print_json(found)
    elif not (watch and sys.stdout.isatty()):
        print_result(status_view(study, found))
    if not found["complete"]:
        raise typer.Exit(1)


@reading_app.command()
def best(
    target: Target,
    name: Name = None,
    form: Annotated[
        Optional[Values],  # noqa: UP045
        typer.Option("--as", help="Print the values alone in this form."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the best trial, or print its values alone."""
    with imports():
        from studies.commands.look import best_values, trial_data, trial_view
        from studies.views.stored import StoredStudy

    study = StoredStudy(target, name)
    number = study.best.number
    if form is not None:
        print_result(best_values(study, form.value))
    elif json:
        print_json(trial_data(study, number))
    else:
        print_result(trial_view(study, number))


@reading_app.command()
def show(
    target: Target,
    number: Annotated[
        Optional[int],  # noqa: UP045
        typer.Argument(metavar="N", help="Number of a trial; all trials without one."),
    ] = None,
    name: Name = None,
    front: Annotated[
        bool, typer.Option("--front", help="Of several objectives: the best compromises only.")
    ] = False,
    json: Json = False,
) -> None:
    """Show all trials in a table, or everything about one."""
    with imports():
        from studies.commands.look import trial_data, trial_view
        from studies.views.stored import StoredStudy
        from studies.views.summary import as_json
        from studies.views.tables import trials_table

    study = StoredStudy(target, name)
    if number is None:
        records = study.front if front else study.trials
        if json:
            print_json([as_json(record) for record in records])
        else:
            print_result(trials_table(study, records))
    elif json:
        print_json(trial_data(study, number))
    else:
        print_result(trial_view(study, number))


@reading_app.command()
def compare(
    targets: Targets,
    names: Names = None,
    json: Json = False,
) -> None:
    """Compare best trials, costs and settings of studies.

    Of one database all studies, or those that --study names.
    """
    with imports():
        from studies.commands.look import compared, compared_view, to_compare

    found = compared(to_compare(targets, names or []))
    if json:
        print_json(found)
    else:
        for part in compared_view(found):
            print_result(part)


@reading_app.command()
def export(
    target: Target,
    form: Annotated[Format, typer.Argument(metavar="csv|parquet|json", help="Format.")],
    name: Name = None,
    to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File to write; standard output without it."),
    ] = None,
) -> None:
    """Write all trials as a table, one row each."""
    with imports():
        from studies.views.export import export_study
        from studies.views.stored import StoredStudy

    export_study(StoredStudy(target, name), form.value, to)


@reading_app.command()
def dashboard(
    target: Target,
    name: Name = None,
    port: Annotated[int, typer.Option(help="0 for any free one.", min=0, max=65535)] = 8080,
    write: Annotated[
        bool, typer.Option("--write", help="Let the pages change and delete.")
    ] = False,
) -> None:
    """Serve pages about the study on this machine.

    The address has a secret.  Ctrl-C ends it.
    """
    with imports():
        from studies.dashboard.app import Dashboard
        from studies.views.stored import StoredStudy

    served = Dashboard.of(StoredStudy(target, name), port, write=write)
    print_result(served.url)
    sys.stdout.flush()
    print("Ctrl-C ends it.", file=sys.stderr)
    # Optuna's, for its own figure: some names are the sampler's in few trials only.
    warnings.filterwarnings("ignore", "Some regimes for parameter", UserWarning)
    try:
        served.server.serve_forever()
    except KeyboardInterrupt:
        served.server.server_close()


@reading_app.command()
def report(
    target: Target,
    name: Name = None,
    to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for the report; default DIR/report."),
    ] = None,
    json: Json = False,
) -> None:
    """Write a self-contained HTML page, and each figure as PNG."""
    with imports():
        from studies.figures.report import write_report
        from studies.views.stored import StoredStudy

    study = StoredStudy(target, name)
    page, *pictures = map(str, write_report(study, to or study.folder / "report"))
    if json:
        print_json({"report": page, "figures": pictures})
    else:
        print_result("\n".join([page, *pictures]))
