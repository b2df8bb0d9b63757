"""What there is: tasks, learners, algorithms; and what a storage holds."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from studies.views.tables import number

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

__all__ = ["algorithm_classes", "listing", "show_table", "stored_studies"]


def listing() -> dict[str, dict[str, str]]:
    """Return names with one line about each, by kind."""
    import hypergrad
    from adapters import registry, tasks
    from bilevel import Descent
    from studies.sampling.samplers import PRUNERS, SAMPLERS

    # The classes' own first lines are formulas; their files say in words what they are.
    estimators = {kind.__name__: _title(kind) for kind in _classes(hypergrad, hypergrad.Estimator)}
    algorithms = {
        name: _title(kind) if kind is Descent else _line(kind)
        for name, kind in algorithm_classes().items()
    }
    return {
        "tasks": tasks.describe(),
        "learners": registry.describe(),
        "algorithms": algorithms,
        "estimators": estimators,
        "samplers": {name: f"{optuna_name} of Optuna" for name, optuna_name in _made(SAMPLERS)},
        "pruners": {name: f"{make.__name__} of Optuna" for name, make in PRUNERS.items()},
    }


def algorithm_classes() -> dict[str, type]:
    """Return the outer algorithms by name."""
    from bilevel import Descent, OuterAlgorithm, inexact, self_tuning, single_loop

    found: dict[str, type] = {"Descent": Descent}
    for package in (self_tuning, inexact, single_loop):
        for kind in _classes(package, OuterAlgorithm):
            if kind is not single_loop.StochasticBilevel:
                found[kind.__name__] = kind
    return found


def _classes(module: ModuleType, base: type) -> Iterator[type]:
    """Yield the public classes of a module that can be used as a `base`."""
    for name in sorted(module.__all__, key=str.lower):
        kind = getattr(module, name)
        if inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind):
            yield kind


def _made(samplers: Mapping[str, Callable[[int], BaseSampler]]) -> list[tuple[str, str]]:
    """Return the name of each sampler and of its class, which only an object tells."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return [(name, type(make(0)).__name__) for name, make in samplers.items()]


def _line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").splitlines()[0]


def _title(kind: type) -> str:
    """The first line of the file that defines a class."""
    return (sys.modules[kind.__module__].__doc__ or "").splitlines()[0]


def stored_studies(storage: str) -> list[dict[str, Any]]:
    """Return the studies of a storage with counts and best trials, as plain data.

    Raises:
        StorageError: the storage does not exist or is no database.
    """
    import optuna

    from studies.storage.database import open_storage, parse_storage
    from studies.views.summary import summary

    database = open_storage(parse_storage(storage), create=False)
    names = sorted(optuna.get_all_study_names(database))
    return [summary(optuna.load_study(study_name=name, storage=database)) for name in names]


def show_table(studies: list[dict[str, Any]]) -> Table:
    """One row for each study."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("study", overflow="fold")
    for heading in ("complete", "cost", "best", "value", "test loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    for study in studies:
        best = study["best"] or {}
        failed = f" ({study['failed']} failed)" if study["failed"] else ""
        table.add_row(
            study["study"],
            f"{study['complete']}/{study['trials']}{failed}",
            str(study["equivalent_steps"]),
            ", ".join(map(str, study["front"])) or str(best.get("number", "-")),
            number(best.get("value")),
            number(best.get("metrics", {}).get("test/loss")),
        )
    return table
