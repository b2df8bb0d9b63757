"""`bilevel study`: run studies, look at them.  A command imports what it needs when called."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from studies.printing import Json, print_json, print_result

__all__ = ["study_app"]

study_app = typer.Typer(
    help="Run studies, look at them, go on with them.", no_args_is_help=True, rich_markup_mode=None
)

Target = Annotated[
    str,
    typer.Argument(metavar="DIR", help="Folder of a study, SQLite file, or database URL."),
]
Name = Annotated[
    Optional[str],  # noqa: UP045  (typer reads the annotation at run time)
    typer.Option("--study", help="Which study, where a database holds several."),
]
Own = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(metavar="NAME=OWNER", help="Owner of a name: grad, sampler, shared, fixed."),
]
Trials = Annotated[Optional[int], typer.Option(help="Trials in total.", min=1)]  # noqa: UP045
Workers = Annotated[Optional[int], typer.Option(help="Trials at a time.", min=1)]  # noqa: UP045
Ray = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--ray-address", help="Run on this Ray cluster, such as 'auto'."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


class Values(StrEnum):
    """Forms of `bilevel study best`."""

    yaml = "yaml"
    json = "json"
    py = "py"
    toml = "toml"


class Format(StrEnum):
    """Forms of `bilevel study export`."""

    csv = "csv"
    parquet = "parquet"
    json = "json"


@study_app.command()
def run(
    file: Annotated[
        str, typer.Argument(help="STUDY.toml, package.module:function or FILE.py:function.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    trials: Trials = None,
    budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of each trial: steps, or such as equivalent_steps=3000."),
    ] = None,
    workers: Workers = None,
    seed: Annotated[Optional[int], typer.Option(help="Of the study.", min=0)] = None,  # noqa: UP045
    own: Own = None,
    ray_address: Ray = None,
    storage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Database URL; default OUT/study.db.", envvar="BILEVEL_STORAGE", show_envvar=True
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Run a study; the same command again goes on with it."""
    from studies.running import run_study

    given = _given(
        trials=trials, budget=budget, seed=seed, own=_owners(own), run=_run(workers, ray_address)
    )
    run_study(file, out, given, storage=storage, quiet=quiet, as_json=json)


@study_app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the study.")],
    trials: Trials = None,
    workers: Workers = None,
    ray_address: Ray = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Go on with an interrupted study, or give it more trials."""
    from studies.running import resume_study

    given = _given(trials=trials, run=_run(workers, ray_address))
    resume_study(folder, given, quiet=quiet, as_json=json)


@study_app.command()
def status(
    target: Target,
    name: Name = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it every two seconds until nobody runs it.")
    ] = False,
    json: Json = False,
) -> None:
    """Say who runs a study and how far it is."""
    from studies.status import status_of, status_view, watch_status
    from studies.stored import StoredStudy

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


@study_app.command()
def best(
    target: Target,
    name: Name = None,
    form: Annotated[
        Optional[Values],  # noqa: UP045
        typer.Option("--as", help="Print the values alone in this form."),
    ] = None,
    json: Json = False,
) -> None:
    """Show the best trial, or print its hyperparameters for another program."""
    from studies.look import best_values, trial_data, trial_view
    from studies.stored import StoredStudy

    study = StoredStudy(target, name)
    number = study.best.number
    if form is not None:
        print_result(best_values(study, form.value))
    elif json:
        print_json(trial_data(study, number))
    else:
        print_result(trial_view(study, number))


@study_app.command()
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
    """Show a trial with everything that is stored of it, or all trials in a table."""
    from studies.look import trial_data, trial_view
    from studies.stored import StoredStudy
    from studies.summary import as_json
    from studies.tables import trials_table

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


@study_app.command()
def compare(
    targets: Annotated[list[str], typer.Argument(metavar="DIR DIR...", help="Studies.")],
    json: Json = False,
) -> None:
    """Put studies side by side: best trials, costs, and which settings differ."""
    from studies.look import compared, compared_view
    from studies.stored import StoredStudy

    if len(targets) < 2:
        raise ValueError(f"compare needs at least two studies, but got {targets}.")
    found = compared([StoredStudy(target) for target in targets], targets)
    if json:
        print_json(found)
    else:
        for part in compared_view(found):
            print_result(part)


@study_app.command()
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
    from studies.export import export_study
    from studies.stored import StoredStudy

    export_study(StoredStudy(target, name), form.value, to)


@study_app.command()
def dashboard(
    target: Target,
    name: Name = None,
    port: Annotated[int, typer.Option(help="0 for any free one.", min=0, max=65535)] = 8080,
    write: Annotated[
        bool, typer.Option("--write", help="Let the pages change and delete.")
    ] = False,
) -> None:
    """Serve the study's pages on this machine, at an address with a secret, until Ctrl-C."""
    from studies.dashboard import Dashboard
    from studies.stored import StoredStudy

    served = Dashboard.of(StoredStudy(target, name), port, write=write)
    print_result(served.url)
    sys.stdout.flush()
    print("Ctrl-C ends it.", file=sys.stderr)
    try:
        served.server.serve_forever()
    except KeyboardInterrupt:
        served.server.server_close()


@study_app.command()
def report(
    target: Target,
    name: Name = None,
    to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for the report; default DIR/report."),
    ] = None,
) -> None:
    """Write one self-contained HTML page with all figures, and the figures as PNG."""
    from studies.report import study_report
    from studies.stored import StoredStudy

    study = StoredStudy(target, name)
    print_result(str(study_report(study, to or study.folder / "report")))


@study_app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the study.")],
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended.")] = False,
    json: Json = False,
) -> None:
    """Look for open trials, torn files and missing artifacts in a study's folder."""
    from studies.study_doctor import examine_study, mend
    from studies.tables import findings_table

    found = examine_study(folder)
    if fix and any(trouble.fix is not None for trouble in found):
        found = mend(folder, found)
    if json:
        keys = ("topic", "value", "level", "advice")
        print_json([{key: getattr(trouble, key) for key in keys} for trouble in found])
    else:
        print_result(findings_table(found))
    if any(trouble.level == "error" for trouble in found):
        raise typer.Exit(1)


@study_app.command()
def gc(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the study.")],
    delete: Annotated[bool, typer.Option("--delete", help="Remove them.")] = False,
    json: Json = False,
) -> None:
    """List files that no command needs any more; remove them with --delete."""
    from studies.study_doctor import collect

    found = collect(folder, delete)
    if json:
        print_json(found)
        return
    for file in found["files"]:
        print_result(f"{file['bytes'] / 1024:9.1f} KiB  {file['path']}  ({file['why']})")
    done = "removed" if delete else "could be removed with --delete"
    print_result(f"{len(found['files'])} files, {found['bytes'] / 1024:.1f} KiB {done}")


def _given(**values: Any) -> dict[str, Any]:
    """Only what was given, as plain data: it is stored for `resume`."""
    return {name: value for name, value in values.items() if value not in (None, {})}


def _run(workers: int | None, ray_address: str | None) -> dict[str, Any]:
    """Where trials run, as plain data."""
    if ray_address is not None:
        address = {"name": "RayActors", "address": ray_address}
        return {"executor": address | ({} if workers is None else {"workers": workers})}
    return {} if workers is None else {"workers": workers, "executor": "auto"}


def _owners(own: list[str] | None) -> dict[str, str]:
    """``["lr=sampler", ...]`` as a mapping."""
    found = {}
    for text in own or ():
        name, equals, owner = text.partition("=")
        if not (name and equals and owner):
            raise ValueError(f"--own must be such as lr=sampler, but got {text!r}.")
        found[name] = owner
    return found
