"""What there is: tasks, learners, algorithms; and what a storage holds."""

from __future__ import annotations

import inspect
from typing import Any

from rich.table import Table

from studies.tables import number

__all__ = ["listing", "show_table", "stored_studies"]


def listing() -> dict[str, dict[str, str]]:
    """Return names with one line about each, by kind."""
    import hypergrad
    from adapters import registry, tasks
    from bilevel.descent import Descent
    from studies.sampling import PRUNERS, SAMPLERS

    estimators = {
        name: _line(getattr(hypergrad, name))
        for name in hypergrad.__all__
        if inspect.isclass(getattr(hypergrad, name))
        and issubclass(getattr(hypergrad, name), hypergrad.Estimator)
        and not inspect.isabstract(getattr(hypergrad, name))
    }
    return {
        "tasks": tasks.describe(),
        "learners": registry.describe(),
        "algorithms": {"Descent": _line(Descent)},
        "estimators": estimators,
        "samplers": {name: f"{type(make(0)).__name__} of Optuna" for name, make in _made(SAMPLERS)},
        "pruners": {name: f"{make.__name__} of Optuna" for name, make in PRUNERS.items()},
    }


def _made(samplers: dict[str, Any]) -> list[tuple[str, Any]]:
    import warnings

    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return list(samplers.items())


def _line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").splitlines()[0]


def stored_studies(storage: str) -> list[dict[str, Any]]:
    """Return the studies of a storage with counts and best trials, as plain data.

    Raises:
        StorageError: the storage does not exist or is no database.
    """
    import optuna

    from studies.coordinator import best_trial
    from studies.record import TrialRecord
    from studies.storage import open_storage, parse_storage

    database = open_storage(parse_storage(storage), create=False)
    found = []
    for name in sorted(optuna.get_all_study_names(database)):
        study = optuna.load_study(study_name=name, storage=database)
        records = [TrialRecord.of(trial) for trial in study.get_trials(deepcopy=False)]
        frozen = best_trial(study) if len(study.directions) == 1 else None
        best = None if frozen is None else TrialRecord.of(frozen)
        found.append(
            {
                "study": name,
                "trials": len(records),
                "complete": sum(r.state == "complete" for r in records),
                "failed": sum(r.state == "failed" for r in records),
                "equivalent_steps": sum(r.cost.equivalent_steps for r in records),
                "best_trial": None if best is None else best.number,
                "best_value": None if best is None else best.value,
                "metrics": {} if best is None else dict(best.metrics),
                "hparams": {} if best is None else dict(best.hparams or best.params),
            }
        )
    return found


def show_table(studies: list[dict[str, Any]]) -> Table:
    """One row for each study."""
    table = Table()
    for heading in ("study", "trials", "complete", "failed", "cost", "best", "value", "test loss"):
        table.add_column(heading, justify="left" if heading == "study" else "right")
    for study in studies:
        best = study["best_trial"]
        table.add_row(
            study["study"],
            *(str(study[key]) for key in ("trials", "complete", "failed", "equivalent_steps")),
            "-" if best is None else str(best),
            number(study["best_value"]),
            number(study["metrics"].get("test/loss")),
        )
    return table
