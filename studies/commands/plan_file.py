"""Plans from files: TOML tables, or a function ``package.module:name`` or ``file.py:name``.

    name = "digits"
    learner = "network"
    task = { name = "digits", noise = 0.3 }
    sampler = { name = "tpe", n_startup_trials = 4 }

    [algorithm]
    name = "Descent"
    lr = 0.1
    estimator = { name = "Unrolled", steps = 5 }

    [space]
    lr = { owner = "grad", low = 1e-3, high = 0.5 }
    width = 32

    [run]
    trials = 12
    budget = { equivalent_steps = 3000 }

A table with a ``name`` makes an object of that name, its other keys being the arguments.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import tomllib
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from adapters import registry, tasks
from adapters.learner import Learner
from adapters.method import Method
from adapters.tasks import Task
from adapters.trainer import Trainer
from bilevel.budget import Budget
from bilevel.checks import did_you_mean
from studies.commands.plan_objects import (
    call,
    changed_space,
    check_keys,
    make_algorithm,
    make_from,
    make_pruner,
    make_sampler,
    named,
)
from studies.executors import config
from studies.plan import Plan, PlanError, run_options, study_options
from studies.runner import schedulers

__all__ = ["budget_of_text", "is_reference", "plan_from_function", "plan_from_table", "read_table"]


def is_reference(text: str) -> bool:
    """Whether a text is ``module:name`` or ``file.py:name``, not a path to a TOML file."""
    return ":" in text and not text.endswith(".toml")


def read_table(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        PlanError: no such file, or not TOML; says where.
    """
    if path.suffix != ".toml":
        raise PlanError(
            f"expected a file STUDY.toml, package.module:function or FILE.py:function, "
            f"but got {str(path)!r}."
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read {str(path)!r}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{str(path)!r} is not TOML: {error}.") from error


def plan_from_function(reference: str) -> Plan:
    """Return the plan behind ``module:name``: a `Plan`, or a function that returns one.

    Raises:
        PlanError: no such module or name, it fails, or it gives something else.
    """
    found = _import(reference, "the study")
    try:
        plan = found() if callable(found) and not isinstance(found, Plan) else found
    except ValueError:  # of an argument of ours: it says which
        raise
    except Exception as error:
        raise PlanError(f"the study: {reference!r} failed: {_where(error)}.") from error
    if not isinstance(plan, Plan):
        raise PlanError(f"{reference!r} must be or return a studies.Plan, but gave {plan!r}.")
    return plan


def plan_from_table(table: Mapping[str, Any], name: str) -> Plan:
    """Return the plan of a parsed TOML file.

    Args:
        table: what the file holds.
        name: of the study, where the table has none.

    Raises:
        PlanError: an unknown key or name, a value of the wrong kind, a key that is missing.
    """
    given = dict(table)
    known = ["name", *study_options(), "run"]
    check_keys(given, list(dict.fromkeys(known)), "the study file")
    for key in ("learner", "task", "run"):
        if key not in given:
            raise PlanError(f"the study file: {key} is missing; it needs learner, task and [run].")
    run = _table(given.pop("run"), "run")
    check_keys(run, ["trials", "budget", *run_options()], "[run]")
    for key in ("trials", "budget"):
        if key not in run:
            raise PlanError(f"[run]: {key} is missing.")
    learner = _learner(given.pop("learner"))
    fields = {
        "learner": learner,
        "task": _task(given.pop("task")),
        "name": given.pop("name", name),
        "trials": run.pop("trials"),
        "budget": _budget(run.pop("budget")),
        "run": run_arguments(run),
    }
    if "space" in given:
        kind = registry.get(learner) if isinstance(learner, str) else learner
        fields["space"] = changed_space(kind.space, _table(given.pop("space"), "space"))
    if "algorithm" in given:
        fields["algorithm"] = make_algorithm(given.pop("algorithm"))
    seed = given.get("seed", 0)
    if "sampler" in given:
        fields["sampler"] = make_sampler(given.pop("sampler"), seed)
    if "pruner" in given:
        fields["pruner"] = make_pruner(given.pop("pruner"))
    own = {f.name for f in dataclasses.fields(Plan)}
    fields |= {key: given.pop(key) for key in list(given) if key in own}
    return Plan(**fields, options=given)


def budget_of_text(text: str) -> Budget | int:
    """Return the budget of ``300`` (steps) or ``equivalent_steps=3000,seconds=60``.

    Raises:
        PlanError: another form, or a limit out of its range.
    """
    parts = [part.partition("=") for part in text.split(",")]
    names = [name.strip() for name, _, _ in parts]
    limits: dict[str, Any] = {}
    try:
        if "=" not in text:
            return int(text)
        for name, (_, _, number) in zip(names, parts, strict=True):
            limits[name] = float(number) if name == "seconds" else int(number)
    except ValueError as error:
        raise PlanError(
            f"budget must be a number of steps, or such as equivalent_steps=3000,seconds=60, "
            f"but got {text!r}."
        ) from error
    if len(limits) < len(names):
        raise PlanError(f"budget: each limit must be given once, but got {text!r}.")
    return _budget(limits)


def run_arguments(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Study.run` that plain data stand for.

    ``scheduler = { name = "Halving", eta = 3 }``, ``executor = { name = "Processes" }`` and
    ``total = { equivalent_steps = 9000 }`` become objects; all else stays as it is.

    Raises:
        PlanError: an unknown name or option, or a value that is refused.
    """
    found = dict(run)
    if "total" in found:
        found["total"] = _budget(found["total"])
    for key, module in (("scheduler", schedulers), ("executor", config)):
        if isinstance(found.get(key), Mapping):
            found[key] = make_from(module, found[key], f"[run] {key}")
    return found


# Parts of a table.


def _learner(value: Any) -> str | type[Learner]:
    """A registry name, or a `Learner` or `Method` class as ``module:Class``."""
    if not isinstance(value, str):
        raise PlanError(f"learner must be a name or 'module:Class', but got {value!r}.")
    if not is_reference(value):
        return value
    kind = _import(value, "learner")
    if inspect.isclass(kind) and issubclass(kind, Method):
        try:
            return cast("type[Learner]", Trainer.of(kind))
        except (TypeError, ValueError) as error:
            raise PlanError(f"learner: {error}") from error
    if not (inspect.isclass(kind) and issubclass(kind, Learner)):
        raise PlanError(f"learner: {value!r} must be a Learner or Method class, but is {kind!r}.")
    return kind


def _task(value: Any) -> str | Task:
    """A registry name, ``{name, options}``, or a function that returns a task."""
    name, options = named(value, "task")
    if is_reference(name):
        task = call(_import(name, "task"), options, "task")
        if not isinstance(task, Task):
            raise PlanError(f"task: {name!r} must return a Task, but gave {task!r}.")
        return task
    try:
        return tasks.get(name, **options) if options else name
    except (TypeError, ValueError) as error:
        raise PlanError(f"task: {error}") from error


def _budget(value: Any) -> Budget | int:
    if isinstance(value, Mapping):
        known = [f.name for f in dataclasses.fields(Budget)]
        check_keys(value, known, "budget")
        try:
            return Budget(**value)
        except (TypeError, ValueError) as error:
            raise PlanError(str(error)) from error
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"budget must be training steps or a table of limits, but got {value!r}.")
    return value


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise PlanError(f"{where} must be a table [{where}], but got {value!r}.")
    return dict(value)


def _import(reference: str, what: str) -> Any:
    """The object behind ``package.module:name`` or ``file.py:name``."""
    place, _, name = reference.rpartition(":")
    folder, module_name = os.getcwd(), place
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise PlanError(f"{what}: there is no file {place!r}.")
        folder, module_name = str(path.parent), path.stem
    if folder not in sys.path:  # worker processes get the path and import the module again
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            raise PlanError(f"{what}: there is no module {module_name!r}.") from error
        raise PlanError(f"{what}: {place!r} does not import: {_where(error)}.") from error
    except Exception as error:
        raise PlanError(f"{what}: {place!r} does not import: {_where(error)}.") from error
    if place.endswith(".py") and Path(str(module.__file__)).resolve() != path:
        raise PlanError(
            f"{what}: {place!r} has the name of the module {module.__file__!r}; rename it."
        )
    if not hasattr(module, name):
        names = [
            n
            for n, v in vars(module).items()
            if not n.startswith("_")
            and (isinstance(v, Plan) or getattr(v, "__module__", "") == module.__name__)
        ]
        raise PlanError(f"{what}: {place!r} has no {name!r}; {did_you_mean(name, names)}")
    return getattr(module, name)


def _where(error: Exception) -> str:
    """What went wrong in a file of the user's, and at which of its lines."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    others = (__file__, "importlib", "site-packages")
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not any(other in f.filename for other in others)]
    return f"{what} ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else what
