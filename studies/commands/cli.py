"""The `bilevel` command: results on standard output, progress on standard error.

Exit codes: 0 done; 1 no trial complete, or `doctor` found an error; 2 bad input; 3 another process
runs the study; 4 the stored study has other settings; 130 interrupted, resumable.
"""

from __future__ import annotations

import json as _json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer

from studies.commands.completion import learner_names, task_names
from studies.commands.printing import Json, print_result
from studies.commands.study_commands import study_app
from studies.storage.collector import imports

__all__ = ["app", "main"]

app = typer.Typer(
    name="bilevel",
    help="Tune hyperparameters while a model trains, and across trials.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(study_app, name="study")


def main() -> None:
    """Run the command line; the exit code says how it ended."""
    try:
        code = app(standalone_mode=False)  # typer returns the code of an Exit, 130 for Ctrl-C
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: a bad option or argument
            _stop(_usage(error), 2)
        if type(error).__name__ == "StorageInternalError":  # Optuna's; the cause says what it is
            reason = str(getattr(error.__cause__, "orig", None) or error).splitlines()[0]
            _stop(f"the database failed: {reason}; `bilevel study doctor DIR` looks at it.", 2)
        known = _exit_code(error)
        if known is None:
            raise
        _stop(str(error), known)
    if code == 130:
        again = "; run the same command with --resume to go on" if "tune" in sys.argv[1:2] else ""
        _stop(f"interrupted{again}.", 130)
    if code:
        sys.exit(code)


def _usage(error: Any) -> str:
    """An error of typer in a sentence, with what its own message leaves out."""
    text = error.format_message().replace("Value error, ", "").rstrip(".")
    if text.startswith("No such command"):
        known = ", ".join(error.ctx.command.list_commands(error.ctx))
        return f"{text.partition('. ')[0]}; known: {known}."  # without a guess of typer's
    for wrong in getattr(error.__cause__, "errors", list)():  # of pydantic, which reads the values
        if repr(wrong["input"]) not in text:
            text += f", but got {wrong['input']!r}"
    return text if text.endswith("?") else f"{text}."


def _exit_code(error: Exception) -> int | None:
    """Return the exit code of an error that is the user's to mend; None for a bug of ours."""

    from studies.commands.running import StoppedError
    from studies.dashboard.app import DashboardError
    from studies.executors.base import ExecutorError
    from studies.runner.agreement import MismatchError
    from studies.runner.coordinator import TooManyFailuresError
    from studies.storage.locks import LockedError
    from studies.views.readable import NoResultError

    codes: list[tuple[type[Exception], int]] = [
        (LockedError, 3),
        (ExecutorError, 2),
        (DashboardError, 2),
        (MismatchError, 4),
        (TooManyFailuresError, 1),
        (NoResultError, 1),
        (StoppedError, 130),
        (ValueError, 2),
        (OSError, 2),
    ]
    return next((code for kind, code in codes if isinstance(error, kind)), None)


def _stop(message: str, code: int) -> NoReturn:
    print(f"bilevel: {message}", file=sys.stderr)
    sys.exit(code)


def _version(value: bool) -> None:
    if value:
        from studies.storage.versions import versions

        print(f"bilevel {versions()['bilevel']}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Tune hyperparameters while a model trains, and across trials."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def tune(
    task: Annotated[
        str,
        typer.Argument(metavar="TASK", help="Name; see `bilevel list`.", autocompletion=task_names),
    ],
    learner: Annotated[
        str, typer.Option(help="Name of a learner.", autocompletion=learner_names)
    ] = "network",
    noise: Annotated[
        Optional[float],  # noqa: UP045  (typer reads the annotation at run time)
        typer.Option(help="Share of wrong training labels; default 0.3 where a task has it."),
    ] = None,
    seed: Annotated[int, typer.Option(help="First seed.", min=0)] = 0,
    seeds: Annotated[int, typer.Option(help="Number of seeds.", min=1)] = 3,
    trials: Annotated[int, typer.Option(help="Trials of each search.", min=2)] = 8,
    budget: Annotated[
        int, typer.Option(help="Equivalent training steps of each way and seed.", min=1)
    ] = 3000,
    out: Annotated[Path, typer.Option(help="Folder for report and figures.")] = Path("bilevel-out"),
    storage: Annotated[
        Optional[str],  # noqa: UP045  (typer reads the annotation at run time)
        typer.Option(help="Database URL or SQLite file; default OUT/TASK.db."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is stored.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    json: Json = False,
) -> None:
    """Compare ways to tune a learner on a task.

    Defaults, random search, TPE, gradient tuning, and TPE with gradients, all at the same cost
    and over several seeds.  Prints a table, and writes a report, figures and the studies.
    """
    with imports():
        from adapters import tasks
        from studies.commands.job import run_comparison

    if noise is None and task in tasks.names() and "noise" in tasks.option_names(task):
        noise = 0.3
    run_comparison(
        task,
        learner,
        options={} if noise is None else {"noise": noise},
        seeds=range(seed, seed + seeds),
        trials=trials,
        budget=budget,
        out=out,
        storage=storage,
        resume=resume,
        quiet=quiet,
        as_json=json,
    )


@app.command("list")
def list_(json: Json = False) -> None:
    """List tasks, learners, algorithms and estimators."""
    with imports():
        from studies.commands.listing import listing
        from studies.views.tables import names_table

    found = listing()
    if json:
        print_result(_json.dumps(found, indent=1))
        return
    for title, rows in found.items():
        print_result(f"{title}:")
        print_result(names_table(rows))


@app.command()
def show(
    storage: Annotated[str, typer.Argument(metavar="STORAGE", help="Database URL or SQLite file.")],
    json: Json = False,
) -> None:
    """Show the studies of a storage and their best trials."""
    with imports():
        from studies.commands.listing import show_table, stored_studies

    studies = stored_studies(storage)
    print_result(_json.dumps(studies, indent=1) if json else show_table(studies))


@app.command()
def doctor(json: Json = False) -> None:
    """Check versions, devices and conflicting packages."""
    from dataclasses import asdict

    with imports():
        from studies.commands.doctor import examine, findings_table

    findings = examine()
    if json:
        print_result(_json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print_result(findings_table(findings))
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)
