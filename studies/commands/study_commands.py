"""`bilevel study`: run studies, look at them.  A command imports what it needs when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from studies.commands.early import start_workers_early
from studies.commands.options import Folder, Own, Quiet, Ray, Trials, Workers
from studies.commands.printing import Json, print_json, print_result
from studies.commands.reading_commands import reading_app
from studies.storage.collector import imports

__all__ = ["study_app"]

study_app = typer.Typer(rich_markup_mode=None)


@study_app.callback(invoke_without_command=True)
def options(context: typer.Context) -> None:
    """Run studies, look at them, go on with them."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@study_app.command()
def run(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="STUDY.toml, package.module:function or FILE.py:function."
        ),
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
    learn: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="DIR|CSV", help="Study or table that the sampler learns from."),
    ] = None,
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
    where = _run(workers, ray_address)
    start_workers_early(where, Path(file))
    with imports():
        from studies.commands.running import run_study

    given = _given(trials=trials, budget=budget, seed=seed, own=_owners(own), run=where)
    run_study(file, out, given, learn=learn or (), storage=storage, quiet=quiet, as_json=json)


@study_app.command()
def resume(
    folder: Folder,
    trials: Trials = None,
    workers: Workers = None,
    ray_address: Ray = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Go on with an interrupted study, or give it more trials."""
    where = _run(workers, ray_address)
    start_workers_early(where)
    with imports():
        from studies.commands.running import resume_study

    given = _given(trials=trials, run=where)
    resume_study(folder, given, quiet=quiet, as_json=json)


study_app.add_typer(reading_app)


@study_app.command()
def doctor(
    folder: Folder,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended.")] = False,
    json: Json = False,
) -> None:
    """Look for open trials, torn files, missing artifacts."""
    with imports():
        from studies.commands.doctor import findings_table
        from studies.commands.study_doctor import examine_study, mend

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
    folder: Folder,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them.")] = False,
    json: Json = False,
) -> None:
    """List files that nothing needs any more, or delete them."""
    with imports():
        from studies.commands.study_doctor import collect

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
        if name in found:
            raise ValueError(f"--own must name {name!r} once, but got {' and '.join(own or ())}.")
        found[name] = owner
    return found
