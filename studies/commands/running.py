"""`bilevel study run` and `resume`: a plan, a folder, progress, and one line about the end."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy.engine import URL

from bilevel.checkpoint import check_writable, replacing
from studies.commands.plan_file import (
    budget_of_text,
    is_reference,
    plan_from_function,
    plan_from_table,
    read_table,
    run_arguments,
)
from studies.commands.screen import progress
from studies.events import Event
from studies.executors.base import ExecutorError
from studies.plan import Plan, PlanError
from studies.storage.database import (
    StorageError,
    check_folder,
    disconnect,
    masked,
    open_storage,
    parse_storage,
)
from studies.storage.layout import DATABASE, SPEC
from studies.storage.locks import LockedError
from studies.storage.versions import versions
from studies.study import Study
from studies.views.readable import NoResultError
from studies.views.stored import StoredStudy, read_spec
from studies.views.summary import done_line, summary

__all__ = ["StoppedError", "resume_study", "run_study"]


class StoppedError(Exception):
    """Ctrl-C was pressed; the message says how to go on."""


def run_study(
    source: str,
    out: Path,
    overrides: Mapping[str, Any],
    *,
    learn: Sequence[str] = (),
    storage: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run the study of a plan in a folder, or go on with it.

    Args:
        source: ``STUDY.toml``, ``module:function`` or ``FILE.py:function``.
        out: the folder.
        overrides: plain data for `_plan`.
        learn: folders of studies, databases and CSV files that the sampler learns from.
        storage: database URL; None for SQLite in the folder.
        quiet: no progress.
        as_json: the result as JSON.

    Raises:
        PlanError: no plan can be made of the source.
        StorageError: the folder or the storage cannot be used, or holds another study.
        NoResultError: no trial is complete at the end.
        StoppedError: after Ctrl-C.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spec: dict[str, Any] = {"format": 1, "plan": _source(source), "overrides": dict(overrides)}
    plan = _plan(spec)
    url = None if storage is None else parse_storage(storage)
    place = parse_storage(out / DATABASE) if url is None else url
    before = read_spec(out) if (out / SPEC).exists() else None
    if before is not None and before["study"] != plan.name:
        raise StorageError(
            f"{str(out)!r} holds the study {before['study']!r}, not {plan.name!r}; "
            "give another --out."
        )
    new = not _holds(place, plan.name)
    if before is not None and new:  # its trials are elsewhere, or lost
        raise StorageError(
            f"{str(out)!r} belongs to the study {plan.name!r} in {before['storage'] or DATABASE}, "
            f"but {masked(place)} has none; give the right --storage, or another --out."
        )
    made = not out.exists()
    check_folder(out, "--out")
    try:
        study = plan.open(storage or out / DATABASE, out)
    except Exception:  # an argument that cannot be
        if made:
            shutil.rmtree(out)
        raise
    spec |= {
        "study": plan.name,
        "storage": None if url is None else masked(url),
        "trials": plan.trials,
        "seed": plan.seed,
        "data": study.task.fingerprint,
        "versions": versions(),
        "written": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    if not (out / SPEC).exists():  # else with the first event: see _run
        _write_spec(out, spec)
    try:
        for source in learn:
            table = source.endswith(".csv")
            if table and not Path(source).is_file():
                raise PlanError(f"--learn: there is no file {source!r}.")
            study.learn(Path(source) if table else StoredStudy(source), name=source)
        _run(plan, study, spec, out, quiet, as_json)
    except (ExecutorError, LockedError, StoppedError):  # `resume` can go on
        raise
    except Exception:
        if new and not study.trials:  # a metric or a learner that cannot be: no reason to keep it
            (out / SPEC).unlink()
            optuna.delete_study(study_name=plan.name, storage=study.database)
            if made:
                shutil.rmtree(out)
        raise


def _holds(url: URL, name: str) -> bool:
    """Whether a database holds a study of a name; a SQLite file may be missing or empty."""
    if url.get_backend_name() == "sqlite":
        path = Path(str(url.database))
        if not path.exists() or (path.is_file() and path.stat().st_size == 0):
            return False
    database = open_storage(url, create=False)
    try:
        return name in optuna.get_all_study_names(database)
    finally:
        disconnect(database)


def resume_study(
    folder: Path,
    overrides: Mapping[str, Any],
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """Go on with a study as its folder says; it needs no plan file where that was TOML.

    Raises:
        StorageError: the folder holds no study.
        PlanError: the function that made the plan is not there any more.
        NoResultError: no trial is complete at the end.
        StoppedError: after Ctrl-C.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stored = StoredStudy(folder)
    if not stored.spec:
        raise StorageError(f"{str(folder)!r} is a database; give the folder of the study.")
    before = stored.spec["overrides"]
    run = {**before.get("run", {}), **overrides.get("run", {})}
    spec = {**stored.spec, "overrides": {**before, **overrides, "run": run}}
    plan = _plan(spec)
    spec["trials"] = plan.trials
    study = plan.open(stored.url.render_as_string(hide_password=False), folder)
    _run(plan, study, spec, folder, quiet, as_json)


def _run(
    plan: Plan, study: Study, spec: Mapping[str, Any], out: Path, quiet: bool, as_json: bool
) -> None:
    written = False

    def write_spec() -> None:
        # Not before the study has agreed to the options: else `resume` would stumble on them.
        nonlocal written
        if not written:
            _write_spec(out, spec)
            written = True

    try:
        with progress(study, plan.trials, quiet) as show:

            def on_event(event: Event) -> None:
                write_spec()
                show(event)

            plan.run_in(study, on_event)
        write_spec()
    except KeyboardInterrupt:
        line = done_line(summary(study.optuna))
        raise StoppedError(f"interrupted: {line}; `bilevel study resume {out}` goes on.") from None
    found = summary(study.optuna)
    if as_json:
        print(json.dumps({**found, "folder": str(out)}, indent=1))
    else:
        print(f"done: {done_line(found)}")
    if not found["complete"]:
        raise NoResultError(f"no trial is complete; `bilevel study show {out} 0` says why.")
    if not quiet and not as_json:
        print(f"next: bilevel study dashboard {out}", file=sys.stderr)


def _source(source: str) -> dict[str, Any]:
    """What a later `resume` makes the plan of: the tables themselves, or the reference."""
    if not is_reference(source):
        path = Path(source)
        table = read_table(path)
        _check_values(table, f"{source}: ")
        return {"file": str(path.resolve()), "toml": table}
    place, _, name = source.rpartition(":")
    if place.endswith(".py"):
        return {"function": f"{Path(place).resolve()}:{name}"}
    return {"function": source, "from": os.getcwd()}


def _check_values(value: Any, where: str) -> None:
    """Refuse what TOML has and a plan has not: nan, inf, dates and times."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        here = f"{where}{key}"
        if isinstance(part, float) and not math.isfinite(part):
            raise PlanError(f"{here} must be finite, but got {part}.")
        if isinstance(part, dict | list):
            _check_values(part, f"{here}.")
        elif not isinstance(part, str | int | float):
            kind = type(part).__name__
            raise PlanError(
                f"{here} must be a text, a number, a list or a table, but got {part} ({kind})."
            )


def _plan(spec: Mapping[str, Any]) -> Plan:
    """The plan of a spec, with what the command line changed."""
    source, given = spec["plan"], dict(spec["overrides"])
    if "toml" in source:
        try:
            plan = plan_from_table(source["toml"], Path(source["file"]).stem)
        except PlanError as error:
            raise PlanError(f"{source['file']}: {error}") from error
    else:
        if "from" in source and source["from"] not in sys.path:
            sys.path.insert(0, source["from"])
        plan = plan_from_function(source["function"])
    if "budget" in given:
        given["budget"] = budget_of_text(given["budget"])
    given["run"] = run_arguments(given.get("run", {}))
    return plan.override(**given)


def _write_spec(out: Path, spec: Mapping[str, Any]) -> None:
    path = out / SPEC
    check_writable(path, "--out")
    with replacing(path) as file:
        file.write(json.dumps(spec, indent=1).encode())
